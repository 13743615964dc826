"""What is left of clusters whose holder was killed is ended at the next start, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coalign import cluster

RAY_LIKE = "import sys, time; print(flush=True); time.sleep(60)"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder in which the clusters of this test lie."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "gettempdir", lambda: folder)
        monkeypatch.setattr(cluster, "MAX_PARENT", len(folder))
        yield Path(folder)


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_processes_of_a_dead_cluster_end_and_others_stay(place: Path) -> None:
    dead, alive = place / f"coalign-ray-{dead_process()}-a", place / f"coalign-ray-{os.getpid()}-b"
    for folder in (dead, alive):
        (folder / "session").mkdir(parents=True)
        (folder / "session" / "log").touch()
    commands = {
        "of the dead": [sys.executable, "-c", RAY_LIKE, f"--session={dead}/session"],
        "of the living": [sys.executable, "-c", RAY_LIKE, f"--session={alive}/session"],
        "of a reader": ["tail", "-f", f"{dead}/session/log"],
    }
    processes = {name: subprocess.Popen(words, stdout=subprocess.PIPE) for name, words in commands.items()}
    try:
        for name in ("of the dead", "of the living"):
            output = processes[name].stdout
            assert output is not None and output.readline()
        fresh = cluster._fresh_folder()
        assert processes["of the dead"].wait(20) < 0
        time.sleep(0.2)
        assert processes["of the living"].poll() is None and processes["of a reader"].poll() is None
        assert not dead.exists() and alive.exists() and fresh.exists()
        assert fresh.name.startswith(f"coalign-ray-{os.getpid()}-")
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


HOLD = """
import sys
from coalign import cluster
tried = []
def start(folder, cpus):
    tried.append(folder)
    print(folder, file=sys.stderr)
    if len(tried) < int(sys.argv[1]):
        raise Exception("too\\nslow")
    return "127.0.0.1:1"
cluster._start_ray = start
sys.exit(cluster.hold(2))
"""


@pytest.mark.parametrize(
    ("works_at", "code", "says"),
    [(1, 0, "127.0.0.1:1"), (3, 0, "127.0.0.1:1"), (9, 2, "error: a private Ray cluster can't be started: too slow")],
)
def test_a_holder_tries_again_and_leaves_no_folder(works_at: int, code: int, says: str) -> None:
    words = [sys.executable, "-c", HOLD, str(works_at)]
    done = subprocess.run(words, input="", capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (code, says)
    folders = done.stderr.split()
    assert len(folders) == len(set(folders)) == min(works_at, cluster.START_ATTEMPTS)
    assert not any(Path(folder).exists() for folder in folders)
