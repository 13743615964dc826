"""Stage 1's rows: replayed ones in their share, held-out ones left out, every input under its own wordings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalign.config import SftTable
from coalign.errors import UserError
from coalign.items import Encoder, sft_stream, training_wordings
from coalign.records import Example, Wording

EXAMPLES = [Example(f"e{i}", "t", f"input {i}", ("yes",), "sft") for i in range(10)]
WORDINGS = [
    Wording("original", "t", "Say yes."),
    Wording("a", "t", "Answer yes.", source="model"),
    Wording("b", "t", "Reply yes.", source="model", split="test"),
]


class WordCodec:
    """One id a character: enough to see what a row holds."""

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


def test_original_and_augmented_make_as_many_rows() -> None:
    table = SftTable(max_steps=4, epochs=0.0, batch_rows=8)
    for kind, texts in (("original", {"Say yes."}), ("augmented", {"Say yes.", "Answer yes."})):
        stream = sft_stream(EXAMPLES, training_wordings(WORDINGS, kind), make_encoder(), table, seed=0)
        assert len(stream) == 32
        assert {text_of(item.prompt).partition("\n\n")[0] for item in stream} == texts


def test_replayed_rows_keep_their_share_over_updates(tmp_path: Path) -> None:
    replay = tmp_path / "replay.jsonl"
    rows = [{"instruction": "Judge.", "input": f"case {i}", "output": "no"} for i in range(5)]
    rows.append({"instruction": "Judge.", "input": "Input  3", "output": "no"})  # an input of another split
    replay.write_text("\n".join(map(json.dumps, rows)))
    table = SftTable(max_steps=50, epochs=0.0, batch_rows=8, replay=str(replay), replay_share=0.05)
    encoder = make_encoder()
    chosen = training_wordings(WORDINGS, "augmented")
    stream = sft_stream(EXAMPLES, chosen, encoder, table, seed=0, held_out={"input 3"})
    replayed = [item for item in stream if text_of(item.prompt).startswith("Judge.")]
    assert len(stream) == 400 and len(replayed) == 20
    assert not any("Input  3" in text_of(item.prompt) for item in replayed)
    assert [row["reason"] for row in encoder.report()] == ["replay_held_out"]


def test_long_rows_are_dropped_and_counted_or_refused() -> None:
    examples = [*EXAMPLES, Example("long", "t", "x" * 80, ("yes",), "sft")]
    table = SftTable(epochs=2.0, batch_rows=4)
    chosen = training_wordings(WORDINGS, "augmented")
    encoder = make_encoder()
    stream = sft_stream(examples, chosen, encoder, table, seed=0)
    assert len(stream) == 22 and not any("xxx" in text_of(item.prompt) for item in stream)
    assert {str(row["id"]).split()[0] for row in encoder.report()} == {"long"}
    with pytest.raises(UserError, match="the context is 60"):
        sft_stream(examples, chosen, make_encoder("error"), table, seed=0)
    with pytest.raises(UserError, match="no row is left to train on"):
        sft_stream(examples[-1:], chosen, make_encoder(), table, seed=0)
