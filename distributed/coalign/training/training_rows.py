"""Records to training items: which wording and which answer each row holds, as token ids, in the order of training.

Knows no engine and no loss.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coalign.config import AlignTable, SftTable
from coalign.data.instances import Instance, parse_row
from coalign.errors import UserError
from coalign.models.codec import Codec
from coalign.process import derive_seed
from coalign.records import Example, Group, Wording, read_rows
from coalign.text import loose_key, unit_hash
from coalign.training.forked_map import chunks_of, forked_map
from coalign.training.micro_batches import Item, permutations
from coalign.training.token_files import Columns, TokenRows, TokenWriter, columns_of
from coalign.wordings.asking import fits
from coalign.wordings.wordings import expected_answer, render_prompt

logger = logging.getLogger("coalign")

DroppedRow = dict[str, str | int]
Reported = dict[tuple[str, str], DroppedRow]


@dataclasses.dataclass
class Encoder:
    """Encodes rows and records those left out; `policy` is the value of model.too_long, "drop" or "error"."""

    codec: Codec
    policy: str
    dropped: Reported = dataclasses.field(default_factory=dict)

    def encode(self, example: Example, wording: Wording, answer: str) -> Item | None:
        """Return prompt and answer as an item, or None when the wording does not fit or the row is too long.

        What is left out is recorded. Raises UserError for a row that is too long under the policy "error".
        """
        name = f"{example.id} under {wording.id}"
        prompt = render_prompt(wording, example.input)
        expected = expected_answer(wording, example.input, answer)
        if prompt is None or expected is None:
            self.drop(name, "wording_does_not_fit")
            return None
        item = Item(name, tuple(self.codec.encode_prompt(prompt)), (tuple(self.codec.encode_answer(expected)),))
        return item if self.fits(item) else None

    def fits(self, item: Item) -> bool:
        """Return whether an item fits the context; raise UserError under the policy "error" when it does not."""
        fitting = fits(item.longest(), self.codec.max_tokens, self.policy, item.name)
        if not fitting:
            self.drop(item.name, "too_long", item.longest())
        return fitting

    def drop(self, name: str, reason: str, tokens: int = 0) -> None:
        """Record a row that is left out; `tokens` is its length when that is the reason."""
        self.dropped.setdefault((name, reason), {"reason": reason, "id": name} | ({"tokens": tokens} if tokens else {}))

    def alone(self) -> Encoder:
        """Return an encoder with an empty record, for a part of the rows."""
        return Encoder(self.codec, self.policy)

    def add(self, dropped: Reported) -> None:
        """Add what was left out of a part; the same row and reason count once."""
        for key, row in dropped.items():
            self.dropped.setdefault(key, row)

    def report(self) -> list[DroppedRow]:
        """Log and return what was left out."""
        for reason in sorted({reason for _, reason in self.dropped}):
            logger.info("%d rows left out: %s", sum(r == reason for _, r in self.dropped), reason)
        return list(self.dropped.values())


def training_wordings(wordings: Sequence[Wording], kind: str) -> dict[str, list[Wording]]:
    """Return each task's training wordings: all of them, or for "original" the original alone."""
    chosen: dict[str, list[Wording]] = {}
    for wording in wordings:
        if wording.split == "train" and (kind == "augmented" or wording.source == "original"):
            chosen.setdefault(wording.task, []).append(wording)
    return chosen


def write_sft(
    writer: TokenWriter,
    examples: Sequence[Example],
    wordings: dict[str, list[Wording]],
    encoder: Encoder,
    table: SftTable,
    seed: int,
) -> None:
    """Write stage 1's rows and the order they are trained on, replayed rows in their places.

    Each pass over the inputs of `sft.split` draws a wording for every input again. Replayed rows replace a share
    `sft.replay_share` of all rows; those whose input is in another split are left out. Raises UserError when no row is
    left.
    """
    inputs = [e for e in examples if e.split == table.split]
    if not inputs:
        raise UserError(f'no inputs in the split "{table.split}"; check data.*_share and data.max_*_inputs')
    table.require_end(len(inputs), table.batch_rows)
    held_out = {loose_key(e.input) for e in examples if e.split != table.split} if table.replay else set()
    replayed = _write_replay(writer, table, encoder, held_out)
    total = table.num_drawn(len(inputs), table.batch_rows)
    mixed = _replayed_by_update(total, table) if replayed else []
    own = iter(_write_own(writer, _Draws(inputs, wordings, encoder, seed), total - sum(mixed)))
    others = (replayed[i] for i in permutations(len(replayed), derive_seed(seed, "replay"))) if replayed else iter(())
    order: list[int] = []
    for number, start in enumerate(range(0, total, table.batch_rows)):
        share = mixed[number] if mixed else 0
        order += itertools.islice(own, min(table.batch_rows, total - start) - share)
        order += itertools.islice(others, share)
    writer.order = np.array(order, np.int64)
    writer.dropped = encoder.report()
    writer.counts = {"inputs": len(inputs), "rows": total}


def _replayed_by_update(total: int, table: SftTable) -> list[int]:
    """Return the number of replayed rows per update; fractions carry over to the next updates."""
    found = []
    for start in range(0, total, table.batch_rows):
        batch = min(table.batch_rows, total - start)
        due = round(table.replay_share * (start + batch)) - round(table.replay_share * start)
        found.append(min(due, batch - 1))
    return found


@dataclasses.dataclass(frozen=True)
class _Draws:
    """Stage 1's draws: a draw is its number and the index of its input; its wording follows from the seed."""

    inputs: Sequence[Example]
    wordings: dict[str, list[Wording]]
    encoder: Encoder
    seed: int

    def numbered(self) -> Iterator[tuple[int, int]]:
        """Yield draws without end, pass after pass over the inputs."""
        return enumerate(permutations(len(self.inputs), derive_seed(self.seed, "sft")))

    def encode(self, draws: Sequence[tuple[int, int]]) -> tuple[Columns, list[int], Reported]:
        """Return the rows of some draws, each draw's place among these rows (-1: no wording fits), what was left out.

        Runs in a forked process. Draws of an input that get the same wording share a row.
        """
        mine = self.encoder.alone()
        items: list[Item] = []
        places: list[int] = []
        known: dict[tuple[int, str], int] = {}
        for number, index in draws:
            example, place = self.inputs[index], -1
            for wording in self._by_preference(number, example.task):
                if (index, wording.id) not in known:
                    item = mine.encode(example, wording, example.outputs[0])
                    known[index, wording.id] = len(items) if item else -1
                    items += [item] if item else []
                place = known[index, wording.id]
                if place >= 0:
                    break
            places.append(place)
        return columns_of(items), places, mine.dropped

    def _by_preference(self, number: int, task: str) -> list[Wording]:
        """Return a task's wordings in the order in which a draw tries them."""
        return sorted(self.wordings.get(task, []), key=lambda w: unit_hash(str(self.seed), str(number), w.id))


def _write_own(writer: TokenWriter, source: _Draws, wanted: int) -> list[int]:
    """Write the rows of the first `wanted` draws that have one; return their row numbers in the order of the draws.

    Inputs that fit under no wording are passed over. Raises UserError when all are.
    """
    drawn: list[int] = []
    useless: set[int] = set()
    numbered = source.numbered()
    while len(drawn) < wanted:
        draws = [(n, i) for n, i in itertools.islice(numbered, wanted - len(drawn)) if i not in useless]
        chunks = chunks_of(sorted(draws, key=lambda draw: (draw[1], draw[0])))  # an input's draws are neighbours
        row_of: dict[int, int] = {}
        encoded = forked_map(source.encode, chunks, "encoding")
        for chunk, (columns, places, dropped) in zip(chunks, encoded, strict=True):
            first = writer.add(columns)
            source.encoder.add(dropped)
            useless |= {index for (_, index), place in zip(chunk, places, strict=True) if place < 0}
            row_of |= {n: first + place for (n, _), place in zip(chunk, places, strict=True) if place >= 0}
        drawn += [row_of[n] for n, _ in draws if n in row_of]
        if len(useless) == len(source.inputs):
            raise UserError(
                "no row is left to train on: every input is too long or fits no wording (see model.max_tokens); the"
                f" first was {source.inputs[draws[0][1]].id}"
            )
    return drawn


def _write_replay(writer: TokenWriter, table: SftTable, encoder: Encoder, held_out: set[str]) -> range:
    """Write the replay file's usable rows and return their row numbers. Raises UserError when there is none."""
    if not table.replay:
        return range(0)

    def encode(rows: Sequence[tuple[int, dict[str, Any]]]) -> tuple[Columns, Reported]:
        mine = encoder.alone()
        found = [_replay_item(number, row, table.replay, mine, held_out) for number, row in rows]
        return columns_of([item for item in found if item]), mine.dropped

    first = writer.num_rows
    for columns, dropped in forked_map(
        encode, chunks_of(list(read_rows(Path(table.replay), "sft.replay"))), "encoding"
    ):
        writer.add(columns)
        encoder.add(dropped)
    if writer.num_rows == first:
        raise UserError(f"sft.replay={table.replay!r} holds no usable row")
    return range(first, writer.num_rows)


def _replay_item(number: int, row: dict[str, Any], path: str, encoder: Encoder, held_out: set[str]) -> Item | None:
    name = f"{path}, line {number}"
    instance = parse_row(row, name)
    if not isinstance(instance, Instance):
        encoder.drop(name, instance.reason)
        return None
    if instance.input.strip() and loose_key(instance.input) in held_out:
        encoder.drop(name, "replay_held_out")
        return None
    task = instance.instruction
    wording = Wording("replay", task, task, kind="system" if instance.system else "prefix")
    example = Example(f"{path}:{number}", task, instance.input, instance.outputs, "sft")
    return encoder.encode(example, wording, example.outputs[0])


def write_groups(
    writer: TokenWriter,
    groups: Sequence[Group],
    examples: dict[str, Example],
    wordings: dict[tuple[str, str], Wording],
    encoder: Encoder,
) -> None:
    """Write stage 2's groups; `examples` are by id, `wordings` by (task, id). Raises UserError when no group fits."""

    def encode(part: Sequence[Group]) -> tuple[Columns, Reported]:
        mine = encoder.alone()
        items = [_group_item(g, examples[g.example], wordings[g.task, g.wording], mine.codec) for g in part]
        return columns_of([item for item in items if mine.fits(item)]), mine.dropped

    for columns, dropped in forked_map(encode, chunks_of(groups), "encoding"):
        writer.add(columns)
        encoder.add(dropped)
    if not writer.num_rows:
        raise UserError("no group is left to train on: all are longer than the context (see model.max_tokens)")
    writer.dropped = encoder.report()
    writer.counts = {"groups": writer.num_rows}


def _group_item(group: Group, example: Example, wording: Wording, codec: Codec) -> Item:
    name = f"{group.example} under {group.wording}"
    prompt = render_prompt(wording, example.input)
    assert prompt is not None, f"{name}: rank leaves out what does not render"
    return Item(
        name=name,
        prompt=tuple(codec.encode_prompt(prompt)),
        responses=tuple(tuple(codec.encode_answer(c.text, c.finish == "stop")) for c in group.candidates),
        rewards=tuple(c.reward for c in group.candidates),
        best=next(i for i, c in enumerate(group.candidates) if c.best),
    )


def group_stream(items: TokenRows, table: AlignTable, seed: int) -> TokenRows:
    """Return stage 2's groups in the order they are trained on: seeded permutations, one per pass over them."""
    table.require_end(len(items), table.batch_groups)
    wanted = table.num_drawn(len(items), table.batch_groups)
    order = itertools.islice(permutations(len(items), derive_seed(seed, "align")), wanted)
    return items.take(np.fromiter(order, np.int64))
