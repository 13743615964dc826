"""Records to training items: which wording and answer each row of an update holds, as token ids.

Used by launch/sft.py and launch/align.py. Knows no engine and no loss.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from coalign.batching import Item, permutations
from coalign.config import AlignTable, SftTable
from coalign.encoding import Codec
from coalign.errors import UserError
from coalign.instances import Instance, parse_row
from coalign.process import derive_seed
from coalign.records import Example, Group, Wording, read_rows
from coalign.text import normalise_input, unit_hash
from coalign.wordings import expected_answer, render_prompt

logger = logging.getLogger("coalign")

Dropped = dict[str, str | int]


@dataclasses.dataclass
class Encoder:
    """Encodes rows and keeps account of those that are left out; `policy` is model.too_long."""

    codec: Codec
    policy: str
    dropped: dict[tuple[str, str], Dropped] = dataclasses.field(default_factory=dict)

    def encode(self, example: Example, wording: Wording, answer: str) -> Item | None:
        """Return prompt and answer as an item, or None (recorded) when the wording does not fit or it is too long."""
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
        if item.longest() <= self.codec.max_tokens:
            return True
        if self.policy == "error":
            raise UserError(
                f"{item.name} takes {item.longest()} tokens, the context is {self.codec.max_tokens}; set"
                ' model.too_long="drop" to leave such rows out, or use a model with a longer context'
            )
        self.drop(item.name, "too_long", item.longest())
        return False

    def drop(self, name: str, reason: str, tokens: int = 0) -> None:
        """Record a row that is left out."""
        self.dropped.setdefault((name, reason), {"reason": reason, "id": name} | ({"tokens": tokens} if tokens else {}))

    def report(self) -> list[Dropped]:
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


def sft_stream(
    examples: Sequence[Example],
    wordings: dict[str, list[Wording]],
    encoder: Encoder,
    table: SftTable,
    seed: int,
    held_out: set[str] | None = None,
) -> list[Item]:
    """Return stage 1's rows in the order they are trained on, replayed rows in their places.

    Each pass draws a wording for each input anew. Replayed rows take the place of own ones, `sft.replay_share` of all
    rows; those whose input is in `held_out` (normal forms of the other splits' inputs) are left out. Raises UserError
    when no row is left.
    """
    if not examples:
        raise UserError(f'no inputs in the split "{table.split}"; check data.*_share and data.max_*_inputs')
    rows = table.max_steps * table.batch_rows or math.ceil(table.epochs * len(examples))
    replay = _replay_items(table, encoder, held_out or set())
    own = _draw(examples, wordings, encoder, seed)
    others = (replay[i] for i in permutations(len(replay), derive_seed(seed, "replay"))) if replay else iter(())
    stream: list[Item] = []
    while len(stream) < rows:
        batch = min(table.batch_rows, rows - len(stream))
        # What a share leaves over of one update is made up for in the next ones.
        due = round(table.replay_share * (len(stream) + batch)) - round(table.replay_share * len(stream))
        mixed = min(due, batch - 1) if replay else 0
        stream += list(itertools.islice(own, batch - mixed)) + list(itertools.islice(others, mixed))
    return stream


def _draw(
    examples: Sequence[Example], wordings: dict[str, list[Wording]], encoder: Encoder, seed: int
) -> Iterator[Item]:
    """Yield one row after another without end, passing over inputs that fit under no wording."""
    useless: set[str] = set()
    for number, index in enumerate(permutations(len(examples), derive_seed(seed, "sft"))):
        example = examples[index]
        if example.id in useless:
            continue
        order = sorted(wordings.get(example.task, []), key=lambda w: unit_hash(str(seed), str(number), w.id))
        found = next((i for w in order if (i := encoder.encode(example, w, example.outputs[0]))), None)
        if found:
            yield found
            continue
        useless.add(example.id)
        if len(useless) == len(examples):
            raise UserError(
                "no row is left to train on: every input is too long or fits no wording (see model.max_tokens); the"
                f" first was {example.id}"
            )


def _replay_items(table: SftTable, encoder: Encoder, held_out: set[str]) -> list[Item]:
    if not table.replay:
        return []
    items = []
    for number, row in read_rows(Path(table.replay)):
        instance = parse_row(row, f"{table.replay}, line {number}")
        name = f"{table.replay}, line {number}"
        if not isinstance(instance, Instance):
            encoder.drop(name, instance.reason)
            continue
        if instance.input.strip() and normalise_input(instance.input) in held_out:
            encoder.drop(name, "replay_held_out")
            continue
        task = instance.instruction
        wording = Wording(id="replay", task=task, text=task)
        example = Example(f"{table.replay}:{number}", task, instance.input, instance.outputs, "sft")
        if item := encoder.encode(example, wording, example.outputs[0]):
            items.append(item)
    if not items:
        raise UserError(f"sft.replay={table.replay!r} holds no usable row")
    return items


def group_items(
    groups: Sequence[Group], examples: dict[str, Example], wordings: dict[tuple[str, str], Wording], encoder: Encoder
) -> list[Item]:
    """Return stage 2's groups as items. Raises UserError when none is left."""
    items = []
    for group in groups:
        name = f"{group.example} under {group.wording}"
        prompt = render_prompt(wordings[group.task, group.wording], examples[group.example].input)
        assert prompt is not None, f"{name}: rank leaves out what does not render"
        item = Item(
            name=name,
            prompt=tuple(encoder.codec.encode_prompt(prompt)),
            responses=tuple(tuple(encoder.codec.encode_answer(c.text, c.finish == "stop")) for c in group.candidates),
            rewards=tuple(c.reward for c in group.candidates),
            best=next(i for i, c in enumerate(group.candidates) if c.best),
        )
        if encoder.fits(item):
            items.append(item)
    if not items:
        raise UserError("no group is left to train on: all are longer than the context (see model.max_tokens)")
    return items


def group_stream(items: Sequence[Item], table: AlignTable, seed: int) -> list[Item]:
    """Return stage 2's groups in the order they are trained on."""
    wanted = table.max_steps * table.batch_groups or math.ceil(table.epochs * len(items))
    order = itertools.islice(permutations(len(items), derive_seed(seed, "align")), wanted)
    return [items[i] for i in order]
