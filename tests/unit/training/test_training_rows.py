"""Stage 1's rows: replayed ones in their share, held-out ones left out, every input under its own wordings."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from coalign.config import AlignTable, SftTable
from coalign.errors import UserError
from coalign.process import derive_seed
from coalign.records import Candidate, Example, Group, Wording
from coalign.text import unit_hash
from coalign.training import forked_map
from coalign.training.micro_batches import Item, permutations
from coalign.training.token_files import TokenRows, open_rows, prepare_rows, read_meta
from coalign.training.training_rows import Encoder, group_stream, training_wordings, write_groups, write_sft

EXAMPLES = [Example(f"e{i}", "t", f"input {i}", ("yes",), "sft") for i in range(10)]
WORDINGS = [
    Wording("original", "t", "Say yes."),
    Wording("a", "t", "Answer yes.", source="model"),
    Wording("b", "t", "Reply yes.", source="model", split="test"),
]


class WordCodec:
    """One id per character: enough to see what a row holds."""

    max_tokens = 60

    def encode_prompt(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_answer(self, text: str, finished: bool = True) -> list[int]:
        return [ord(c) for c in text] + [0] * finished


def make_encoder(policy: str = "drop") -> Encoder:
    codec: Any = WordCodec()
    return Encoder(codec, policy)


def text_of(prompt: tuple[int, ...]) -> str:
    return "".join(map(chr, prompt))


def sft_stream(
    folder: Path, examples: Sequence[Example], kind: str, table: SftTable, encoder: Encoder | None = None
) -> TokenRows:
    """Return stage 1's rows, as the recipe has them written and opens them."""
    chosen, encoder = training_wordings(WORDINGS, kind), encoder or make_encoder()
    prepare_rows(folder / "rows", "", lambda writer: write_sft(writer, examples, chosen, encoder, table, 0))
    return open_rows(folder / "rows")


def slow_stream(examples: Sequence[Example], rows: int) -> list[Item]:
    """Return stage 1's rows one after another: each draw takes the first wording that fits."""
    encoder, stream = make_encoder(), []
    for number, index in enumerate(permutations(len(examples), derive_seed(0, "sft"))):
        order = sorted(WORDINGS[:2], key=lambda w: unit_hash("0", str(number), w.id))
        found = [encoder.encode(examples[index], w, "yes") for w in order]
        stream += [item for item in found if item][:1]
        if len(stream) == rows:
            return stream
    raise AssertionError


@pytest.fixture
def many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rows be encoded by three processes, a few each."""
    monkeypatch.setattr(forked_map, "CHUNK", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})


@pytest.mark.parametrize("processes", ["one", "many"])
def test_rows_are_drawn_as_one_by_one(processes: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Whatever the number of processes: the stream of the slow twin, inputs that are too long passed over."""
    if processes == "many":
        request.getfixturevalue("many_processes")
    long = [Example(f"long{i}", "t", "x" * (40 + i), ("yes",), "sft") for i in range(6)]  # some fit one wording alone
    stream = sft_stream(tmp_path, [*EXAMPLES, *long], "augmented", SftTable(epochs=3.0, batch_rows=4))
    expected = slow_stream([*EXAMPLES, *long], 48)
    assert list(stream) == expected
    stored = len(stream.columns["row_starts"]) - 1
    assert len({item.name for item in expected}) <= stored < 48, "a row that is drawn again is written once"
    dropped = [json.loads(line) for line in (tmp_path / "rows" / "dropped.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in dropped} == {"too_long"} and read_meta(tmp_path / "rows")["counts"] == {
        "inputs": 16, "rows": 48, "dropped": len(dropped)
    }  # fmt: skip


def test_original_and_augmented_make_as_many_rows(tmp_path: Path) -> None:
    table = SftTable(max_steps=4, epochs=0.0, batch_rows=8)
    for kind, texts in (("original", {"Say yes."}), ("augmented", {"Say yes.", "Answer yes."})):
        stream = sft_stream(tmp_path / kind, EXAMPLES, kind, table)
        assert len(stream) == 32
        assert {text_of(item.prompt).partition("\n\n")[0] for item in stream} == texts


def test_replayed_rows_keep_their_share_over_updates(tmp_path: Path, many_processes: None) -> None:
    replay = tmp_path / "replay.jsonl"
    rows = [{"instruction": "Judge.", "input": f"case {i}", "output": "no"} for i in range(5)]
    rows.append({"instruction": "Judge.", "input": "Input  3", "output": "no"})  # an input of another split
    replay.write_text("\n".join(map(json.dumps, rows)))
    table = SftTable(max_steps=50, epochs=0.0, batch_rows=8, replay=str(replay), replay_share=0.05)
    encoder = make_encoder()
    stream = sft_stream(
        tmp_path, [*EXAMPLES, Example("d", "t", "input 3", ("yes",), "dev")], "augmented", table, encoder
    )
    judged = [text_of(item.prompt).startswith("Judge.") for item in stream]
    assert len(stream) == 400 and sum(judged) == 20
    assert [sum(judged[i : i + 40]) for i in range(0, 400, 40)] == [2] * 10
    assert not any("Input  3" in text_of(item.prompt) for item in stream)
    assert [row["reason"] for row in encoder.report()] == ["replay_held_out"]


def test_long_rows_are_dropped_and_counted_or_refused(tmp_path: Path, many_processes: None) -> None:
    examples = [*EXAMPLES, Example("long", "t", "x" * 80, ("yes",), "sft")]
    table = SftTable(epochs=2.0, batch_rows=4)
    encoder = make_encoder()
    stream = sft_stream(tmp_path, examples, "augmented", table, encoder)
    assert len(stream) == 22 and not any("xxx" in text_of(item.prompt) for item in stream)
    assert {str(row["id"]).split()[0] for row in encoder.report()} == {"long"}
    with pytest.raises(UserError, match="the context of the model is 60"):
        sft_stream(tmp_path / "error", examples, "augmented", table, make_encoder("error"))
    assert not (tmp_path / "error" / "rows").exists()
    with pytest.raises(UserError, match="no row is left to train on"):
        sft_stream(tmp_path / "none", examples[-1:], "augmented", table)


def test_groups_are_written_in_order(tmp_path: Path, many_processes: None) -> None:
    """Rewards and the best response stay with their responses, groups that are too long are left out."""
    texts = [("yes", "no"), ("no",), ("yes", "maybe", "no"), ("x" * 50,)]
    groups = [
        Group(
            f"e{n}", "t", "a", tuple(Candidate(t, n + k, "stop", 1, ("a",), k == len(ts) - 1) for k, t in enumerate(ts))
        )
        for n, ts in enumerate(texts * 2)
    ]
    examples, wordings = {e.id: e for e in EXAMPLES}, {("t", "a"): WORDINGS[1]}
    encoder = make_encoder()
    prepare_rows(tmp_path / "rows", "", lambda writer: write_groups(writer, groups, examples, wordings, encoder))
    items = open_rows(tmp_path / "rows")
    assert [item.name for item in items] == [f"e{n} under a" for n in (0, 1, 2, 4, 5, 6)]
    assert [item.rewards for item in items] == [(0, 1), (1,), (2, 3, 4), (4, 5), (5,), (6, 7, 8)]
    assert [item.best for item in items] == [1, 0, 2, 1, 0, 2]
    assert [row["id"] for row in encoder.report()] == ["e3 under a", "e7 under a"]
    stream = group_stream(items, AlignTable(epochs=2.0), seed=0)
    assert len(stream) == 12 and [i.name for i in stream[:6]] != [i.name for i in stream[6:]]
    assert sorted(i.name for i in stream) == sorted(itertools.chain(*[[i.name] * 2 for i in items]))
