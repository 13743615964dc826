"""Shards on disk are taken over only whole; the others are computed again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from coalign.clusters.shards import run_shards
from coalign.config import GenerationTable
from coalign.records import Row
from coalign.runs.step_folder import StepFolder

REQUESTS: list[Row] = [{"example": f"e{k}", "prompt_ids": [k], "seeds": [1, 2]} for k in range(5)]
SETTINGS = GenerationTable(workers=0, shard_size=2)


def answer(rows: list[Row]) -> list[Row]:
    """Return what a worker would: an answer per seed."""
    answers = [{"text": "a", "finish": "stop", "num_tokens": 1}] * 2
    return [{"example": row["example"], "answers": answers} for row in rows]


def sampled(folder: Path) -> tuple[list[Row], list[str]]:
    """Return the results of all requests, and which examples were computed for them."""
    computed: list[str] = []

    def work(rows: list[Row]) -> list[Row]:
        computed.extend(row["example"] for row in rows)
        return answer(rows)

    step = StepFolder(folder / "sample", {}, {})
    step.open()
    try:
        return list(run_shards(step, REQUESTS, lambda: work, SETTINGS, "sampling")), computed
    finally:
        step.close()


def rows_of(text: str) -> list[Row]:
    return [json.loads(line) for line in text.splitlines()]


def lines_of(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


DAMAGES: dict[str, Callable[[str], str]] = {
    "a row less": lambda text: lines_of(rows_of(text)[:-1]),
    "a row twice": lambda text: lines_of([rows_of(text)[0]] * 2),
    "a row more": lambda text: lines_of(rows_of(text) * 2),
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "garbage": lambda text: "garbage\n" * 2,
    "numbers": lambda text: "3\n3\n",
    "another step's": lambda text: lines_of([{**row, "answers": None, "text": "x"} for row in rows_of(text)]),
    "an answer less": lambda text: lines_of([{**row, "answers": row["answers"][:1]} for row in rows_of(text)]),
    "another finish": lambda text: text.replace('"stop"', '"x"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_computed_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, computed = sampled(tmp_path)
    assert computed == [f"e{k}" for k in range(5)] and whole == answer(REQUESTS)
    path = tmp_path / "sample" / "shards" / "00001.jsonl"
    path.write_text(DAMAGES[damage](path.read_text("utf-8")), "utf-8")
    with caplog.at_level(logging.INFO, "coalign"):
        assert sampled(tmp_path) == (whole, ["e2", "e3"])
    assert [message for message in caplog.messages if "computed again" in message] == [
        f"sampling: damaged shards are computed again: 1, the first is {path}"
    ]
    assert sampled(tmp_path) == (whole, [])
