"""Which checkpoints are believed: those that are damaged, or hold something else, are passed over and replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalign.training import checkpoints
from coalign.training.checkpoints import TrainingState, checkpoint_folder, complaint_of_checkpoint, rotate

STATE = {"step": 3, "tokens": 12.0, "first_measure": {"loss": 1.5}, "p_best": [0.5]}


def write(folder: Path, step: int = 3, **changed: Any) -> Path:
    """Write a whole checkpoint of one file, with `changed` parts of checkpoint.json."""
    checkpoint = checkpoint_folder(folder, step)
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("weights")
    checkpoints.write_checkpoint_meta(checkpoint, STATE, 2)
    path = checkpoint / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return checkpoint


def test_a_whole_checkpoint_is_believed(tmp_path: Path) -> None:
    assert complaint_of_checkpoint(write(tmp_path)) is None
    assert TrainingState(**checkpoints.read_checkpoint_meta(checkpoint_folder(tmp_path, 3))["state"]).step == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"state": STATE | {"step": "3"}},
        {"state": STATE | {"step": [3]}},
        {"state": STATE | {"step": True}},
        {"state": STATE | {"tokens": None}},
        {"state": STATE | {"first_measure": "x"}},
        {"state": STATE | {"first_measure": {"loss": "x"}}},
        {"state": STATE | {"p_best": 3}},
        {"state": STATE | {"p_best": ["x"]}},
        {"state": STATE | {"more": 1}},
        {"state": []},
        {"world_size": "1"},
        {"files": ["weights"]},
        {"files": {"weights": 3}},
        {"files": {"weights": "0" * 64}},
        {"files": {"../../../secret": "0" * 64}},
        {"files": {"gone": "0" * 64}},
    ],
    ids=str,
)
def test_another_one_is_passed_over(changed: dict[str, Any], tmp_path: Path) -> None:
    assert complaint_of_checkpoint(write(tmp_path, **changed)) is not None


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", "[" * 100_000])
def test_a_damaged_description_is_passed_over(content: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path)
    (checkpoint / "checkpoint.json").write_text(content)
    assert complaint_of_checkpoint(checkpoint) == "checkpoint.json is missing or damaged"


def test_a_file_in_the_place_of_a_checkpoint_is_passed_over_and_removed(tmp_path: Path) -> None:
    newest = write(tmp_path)
    for step in (1, 9):
        checkpoint_folder(tmp_path, step).write_text("no folder")
        assert complaint_of_checkpoint(checkpoint_folder(tmp_path, step)) is not None
    rotate(newest, 1)
    assert [path.name for path in newest.parent.iterdir()] == [newest.name]
