"""How a process that runs others ends: with their exit status, or as a signal asked it to."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from coalign.clusters.ray_connection import _require_listener
from coalign.config import Config
from coalign.config_values import table_values
from coalign.errors import UserError
from coalign.failures import out_of_memory
from coalign.process import check_launcher, free_port, seconds_of, start_seconds

SCRIPT = """
import sys
from coalign.recipe import run_command, run_step
run_step(lambda words: sys.exit(run_command([sys.executable, "-uc", words[0]])))
"""
TIDY = """
import signal, sys, time
def stop(number, frame):
    print("kept", flush=True)
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
print("begun", flush=True)
time.sleep(60)
"""


def start(code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("code", [0, 2])
def test_a_commands_exit_status_is_returned(code: int) -> None:
    process = start(f"raise SystemExit({code})")
    process.communicate(timeout=60)
    assert process.returncode == code


def test_a_signal_to_stop_reaches_the_command_first() -> None:
    process = start(TIDY)
    assert process.stdout and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert out == "kept\n" and process.returncode == 1
    assert "run the same command again" in err and "Traceback" not in err


@pytest.mark.parametrize(("rank", "code"), [({"RANK": "0"}, 0), ({}, -signal.SIGABRT)])
def test_a_rank_leaves_at_once(rank: dict[str, str], code: int) -> None:
    """What ends with the interpreter, such as a process group, can't make a finished rank a failed one."""
    program = "import atexit, os; from coalign.recipe import run_step; atexit.register(os.abort); run_step(print)"
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", program, "done"], env=own | rank, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (code, b"['done']\n")


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", free_port()))


def test_the_advice_for_a_full_memory_separates_what_may_change_while_a_step_resumes() -> None:
    """Only a neutral key may change; of any other the message says that the step's folder must be removed."""
    tables = ("train", "generation", "model")
    deciding = set(table_values(Config(), tables, with_neutral=False))
    neutral = set(table_values(Config(), tables)) - deciding
    before, _, after = out_of_memory(RuntimeError("CUDA out of memory. Tried")).partition("remove the step's folder")
    keys = re.compile(r"(?:train|generation|model)(?:\.[a-z_]+)+")
    assert set(keys.findall(before)) == {"train.micro_batch_tokens"} <= neutral
    assert len(keys.findall(after)) == 4 and set(keys.findall(after)) <= deciding


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            for value in ("abc", "", "1.5", "-1", "9" * 30)
        ),
        ("WORLD_SIZE", "0"),
        ("RANK", "1"),  # of one rank
        ("COALIGN_START_SECONDS", "abc"),
        ("COALIGN_LOCK_WAIT_SECONDS", "nan"),
        ("COALIGN_LOCK_WAIT_SECONDS", "-1"),
    ],
)
def test_a_variable_that_is_no_number_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name}="):
        check_launcher()
        start_seconds()
        seconds_of("COALIGN_LOCK_WAIT_SECONDS", 1.0)


def test_such_a_variable_is_one_line_of_a_command() -> None:
    command = [sys.executable, "-c", "from coalign.recipe import run_step; run_step(print)"]
    done = subprocess.run(command, env=os.environ | {"RANK": "abc"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: RANK='abc'") and done.stderr.count("\n") == 1


def test_a_ray_cluster_that_is_gone_is_known_at_once() -> None:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", f"localhost:{port}"):
            with pytest.raises(OSError, match="refused"):
                _require_listener(address)
        bound.listen()
        _require_listener(f"127.0.0.1:{port}")
    _require_listener("auto")
