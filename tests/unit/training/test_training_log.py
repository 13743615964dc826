"""The log of a training that goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from coalign.config import LogTable
from coalign.training.training_log import TrainingLog

GOOD = b'{"kind": "train", "step": 1, "loss": 2.5}\n'


@pytest.mark.parametrize(
    "damaged",
    [
        b"{\n",
        b"\xff\xfe\n",
        b"3\n",
        b"{}\n",
        b'{"step": "1"}\n',
        b'{"step": null}\n',
        b'{"step": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\n",
        b'{"step": ' + b"9" * 5000 + b"}\n",
        b'{"kind": "train", "step": 9}\n',
        b'{"kind": "train", "step": 1',
    ],
    ids=["cut", "not UTF-8", "number", "empty", "text", "null", "deep", "long", "later", "unfinished"],
)
def test_damaged_and_later_lines_are_left_out(damaged: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + damaged)
    TrainingLog(tmp_path, LogTable(tensorboard=False), 3).close()
    assert path.read_bytes() == GOOD
