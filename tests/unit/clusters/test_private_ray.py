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

from coalign.clusters import private_ray as cluster

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


HOLDER = """
import os, sys
from pathlib import Path
from coalign.clusters import private_ray as cluster

ends, tried = sys.argv[1].split(","), Path(sys.argv[2])

def start(folder, cpus):
    tried.write_text(tried.read_text() + f"{folder}\\n")
    end = ends[len(tried.read_text().split()) - 1]
    if end == "abort":
        os.abort()
    if end == "fail":
        raise RuntimeError("too slow for it")
    return "127.0.0.1:1"

cluster._start_ray = start
sys.exit(cluster.hold(1))
"""


@pytest.mark.parametrize(
    ("ends", "printed", "code"),
    [
        ("start", "127.0.0.1:1", 0),
        ("abort,fail,start", "127.0.0.1:1", 0),
        ("fail,abort,fail", "error: a private Ray cluster can't be started: too slow for it", 2),
        ("fail,fail,abort", "error: a private Ray cluster can't be started: its process ended with -6", 2),
    ],
)
def test_a_start_that_fails_or_aborts_is_tried_again(ends: str, printed: str, code: int, tmp_path: Path) -> None:
    """Each attempt has a process and a folder of its own; no folder stays, the cluster ends with the holder's input."""
    tried = tmp_path / "tried"
    tried.touch()
    command = [sys.executable, "-c", HOLDER, ends, str(tried)]
    pipe = subprocess.PIPE
    holder = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, cwd=cluster.__file__.rpartition("/coalign/")[0]
    )
    assert holder.stdin is not None and holder.stdout is not None
    assert holder.stdout.readline().strip() == printed
    folders = [Path(line) for line in tried.read_text().split()]
    assert len({*folders}) == len(ends.split(","))
    assert [folder.exists() for folder in folders] == [False] * (len(folders) - 1) + [code == 0]
    holder.stdin.close()
    assert holder.wait(60) == code
    assert not any(folder.exists() for folder in folders)


IMPORTED_BEFORE = """
import ray
from coalign.clusters.ray_connection import Cluster

Cluster("", 1)
"""


def test_a_process_that_has_imported_ray_is_told_so() -> None:
    """Ray reads at its import whether it may use 127.0.0.1 and a token; connecting would time out again and again."""
    found = subprocess.run([sys.executable, "-c", IMPORTED_BEFORE], capture_output=True, text=True, timeout=100)
    assert "UserError: this process imported ray before coalign" in found.stderr
