"""What the step before training does for it, and what becomes of that when it is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coalign.config import RunTable
from coalign.runs import encode_ahead
from coalign.runs.run_folder import RunFolder
from unit.waiting import until

RECIPE = """
import sys, time
from pathlib import Path
from coalign.recipe import run_step
def main(argv):
    Path("asked").write_text(" ".join(argv))
    time.sleep(600 if "wait" in argv else 0)
run_step(main)
"""
STEP = """
import sys
from pathlib import Path
from coalign.config import RunTable
from coalign.runs.encode_ahead import encode_ahead
from coalign.runs.run_folder import RunFolder
encode_ahead(Path("sft.py"), RunFolder(RunTable(), sys.argv[1:]), 10**6)
"""


@pytest.fixture(autouse=True)
def _recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sft.py").write_text(RECIPE)


@pytest.mark.parametrize(("rows", "borrowed"), [(encode_ahead.MANY_ROWS - 1, False), (encode_ahead.MANY_ROWS, True)])
def test_few_rows_and_those_of_a_borrowed_step_are_left(rows: int, borrowed: bool) -> None:
    run = RunTable(inputs={"sft": "elsewhere"} if borrowed else {})
    encode_ahead.encode_ahead(Path("sft.py"), RunFolder(run, []), rows)
    assert not Path("asked").exists()


def test_many_rows_are_encoded_with_the_same_words() -> None:
    arguments = ["--local_rank=0", "config.toml", "sft.epochs=2"]
    encode_ahead.encode_ahead(Path("sft.py"), RunFolder(RunTable(), arguments), encode_ahead.MANY_ROWS)
    assert Path("asked").read_text() == "--encode config.toml sft.epochs=2"


def test_a_killed_step_takes_it_along() -> None:
    """The process that encodes would hold the lock of the training step."""
    with subprocess.Popen([sys.executable, "-c", STEP, "wait"]) as step:
        until(Path("asked").exists)
        (child,) = (int(line) for line in Path(f"/proc/{step.pid}/task/{step.pid}/children").read_text().split())
        step.send_signal(signal.SIGKILL)
    until(lambda: not is_running(child))


def is_running(process: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
