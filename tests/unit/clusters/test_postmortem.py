"""What a user is told of a death, in place of Ray's paragraph."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from coalign.clusters import exit_watcher
from coalign.clusters.postmortem import exit_words, read_end, reason_of
from unit.waiting import until

# As Ray 2.60 words it, for os._exit and SIGKILL alike.
DEAD = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: _Actor\n\tactor_id: c46a98\n\tpid: 25381"
    "\n\tnamespace: e4256e6e\n\tip: 127.0.0.1\nThe actor is dead because its worker process has died. Worker exit type:"
    " SYSTEM_ERROR Worker exit detail: {} Some common causes include: (1) the process was killed by the OOM killer"
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            DEAD.format("Worker unexpectedly exits with a connection error code 2. End of file."),
            "it was killed or crashed; Ray does not see its exit status",
        ),
        (DEAD.format("Worker exits with an exit code 1."), "exit status 1"),
        (DEAD.format("Worker was preempted."), "Worker was preempted."),
        ("Task was killed due to the node running low on memory.", "out of memory: Ray's memory monitor killed it"),
    ],
)
def test_rays_paragraph_becomes_one_reason(text: str, says: str) -> None:
    assert reason_of(RuntimeError(text)).startswith(says)


def test_exit_statuses_in_words() -> None:
    assert exit_words(3) == "exit status 3"
    assert exit_words(-11) == "killed by SIGSEGV (exit status -11)"
    assert exit_words(-9) == "killed by SIGKILL (exit status -9), which often means out of memory"


def test_what_is_known_better_than_by_ray_comes_first() -> None:
    dead = RuntimeError(DEAD.format("Worker unexpectedly exits with a connection error code 2. End of file."))
    assert reason_of(dead, exit_words(3)) == "exit status 3"
    short = RuntimeError("Task was killed due to the node running low on memory.")
    assert "memory monitor" in reason_of(short, exit_words(-9))


def watch(logs: Path, program: str) -> subprocess.Popen[str]:
    """Start a program as Ray would: by the text of the watcher, with the words that say where the logs are."""
    logs.mkdir(parents=True, exist_ok=True)
    text = Path(exit_watcher.__file__).read_text(encoding="utf-8")
    where = [f"--temp-dir={logs.parents[1]}", f"--session-name={logs.parent.name}"]
    command = [sys.executable, "-I", "-S", "-c", text, "-c", program, *where]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


SAY = "import os, sys; print(os.environ.get('COALIGN_EXIT_FILE', ''), flush=True); "


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("os._exit(3)", 3),
        ("os.kill(os.getpid(), 9)", -9),
        ("os.abort()", -6),
        ("", 0),
    ],
)
def test_the_watcher_writes_down_how_a_process_ended(tmp_path: Path, end: str, code: int) -> None:
    logs = tmp_path / "ray" / "session" / "logs"
    with watch(logs, SAY + end) as process:
        assert process.stdout
        exit_file = process.stdout.read().strip()
    assert Path(exit_file).parent == logs
    assert read_end("none", exit_file)[1] == code


def test_the_watcher_outlives_the_group_of_what_it_watches(tmp_path: Path) -> None:
    """Ray sends a dead process's group SIGTERM and SIGKILL at once; a process that still runs has no code."""
    with watch(tmp_path / "ray" / "session" / "logs", SAY + "import signal; signal.pause()") as process:
        assert process.stdout
        exit_file = process.stdout.readline().strip()
        (child,) = psutil.Process(process.pid).children()
        assert read_end("none", exit_file)[1] is None
        os.killpg(os.getpgid(child.pid), signal.SIGKILL)
    assert read_end("none", exit_file)[1] == -9


def test_the_python_is_the_one_that_ray_would_have_started(tmp_path: Path) -> None:
    """The raylet's own command names it; whoever else starts a watcher gets the one that runs it."""
    words = ["-c", "import time; time.sleep(600)", "--python_worker_command=/opt/own/python setup_worker.py --x=1"]
    raylet = subprocess.Popen([sys.executable, *words])
    until(lambda: bool(Path(f"/proc/{raylet.pid}/cmdline").read_bytes()))  # none yet while it is being started
    assert exit_watcher.python_of(raylet.pid) == "/opt/own/python"
    raylet.kill()
    raylet.wait()
    assert exit_watcher.python_of(os.getpid()) == exit_watcher.python_of(raylet.pid) == sys.executable


def test_without_a_place_for_its_code_a_process_runs_all_the_same(tmp_path: Path) -> None:
    text = Path(exit_watcher.__file__).read_text(encoding="utf-8")
    command = [sys.executable, "-I", "-S", "-c", text, "-c", SAY + "os._exit(4)"]
    for where in ([], [f"--temp-dir={tmp_path}", "--session-name=gone"]):
        done = subprocess.run([*command, *where], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (4, "")


def test_the_end_of_a_log_without_rays_marks(tmp_path: Path) -> None:
    log = tmp_path / "worker.err"
    log.write_text(":job_id:01\n" + "".join(f"line {i}\n\n" for i in range(20)))
    lines, code, _ = read_end(str(log), str(tmp_path / "none"))
    assert lines == [f"line {i}" for i in range(12, 20)] and code is None
    assert read_end(str(tmp_path / "none"), "")[:2] == ([], None)
