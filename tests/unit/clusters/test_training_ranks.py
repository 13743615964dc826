"""The ranks of one node, without Ray: what they are told, what they print, how they end and are ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coalign.clusters import rank_host
from coalign.clusters.postmortem import exit_words

SCRIPT = """
import os, signal, sys, time
print(*(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")), *sys.argv[1:])
if sys.argv[1] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    print("ready")
    time.sleep(600)
if sys.argv[1] == "fail" and os.environ["RANK"] == "3":
    sys.exit("no luck")
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[rank_host.Host]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step.py").write_text(SCRIPT)
    made = rank_host.Host(str(tmp_path))
    yield made
    made.end()


def start(host: rank_host.Host, word: str, script: str = "step.py") -> str:
    world = {"WORLD_SIZE": "4", "MASTER_ADDR": "here"}
    return host.start((script, word), [world | {"RANK": str(n), "LOCAL_RANK": str(n - 2)} for n in (2, 3)], "127.0.0.1")


def outcome(host: rank_host.Host, done: int = 2) -> tuple[list[tuple[int, str]], list[int | None]]:
    """Poll until so many ranks have ended, or a line says ready from each."""
    lines: list[tuple[int, str]] = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found, codes, _ = host.poll()
        lines += found
        if sum(code is not None for code in codes) >= done and (done or sum(line == "ready" for _, line in lines) == 2):
            return lines, codes
    raise AssertionError(f"{lines}, {codes}")


def test_every_rank_has_its_number_and_all_lines_arrive(host: rank_host.Host) -> None:
    assert start(host, "x") == ""
    lines, codes = outcome(host)
    assert codes == [0, 0]
    assert sorted(lines) == [(2, "2 0 4 here x"), (3, "3 1 4 here x")]


def test_a_failed_rank_shows_its_code_and_its_last_words(host: rank_host.Host) -> None:
    start(host, "fail")
    lines, codes = outcome(host)
    assert codes == [0, 1]
    assert (3, "no luck") in lines


def test_a_signal_reaches_every_rank(host: rank_host.Host) -> None:
    start(host, "wait")
    outcome(host, 0)
    host.signal(signal.SIGTERM)
    assert outcome(host)[1] == [7, 7]


def test_a_killed_rank_is_told_from_a_failed_one(host: rank_host.Host) -> None:
    start(host, "wait")
    outcome(host, 0)
    os.kill(host._ranks[1].pid, signal.SIGKILL)
    _, codes = outcome(host, 1)
    assert codes == [None, -9]
    assert exit_words(-9) == "killed by SIGKILL (exit status -9), which often means out of memory"


def test_a_script_that_the_node_lacks_is_named(host: rank_host.Host) -> None:
    assert start(host, "x", "launch/align.py").endswith("launch/align.py is not there")


def test_the_interface_of_an_address() -> None:
    assert rank_host._interface_of("127.0.0.1").startswith("lo")
    assert rank_host._interface_of("203.0.113.7") == ""


def test_ranks_that_nobody_asks_after_end(host: rank_host.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a node that is cut off they would go on writing beside those that take over."""
    monkeypatch.setattr(rank_host, "LONELY_SECONDS", 4.0)
    start(host, "wait")
    asked_until = time.monotonic() + 6
    while time.monotonic() < asked_until:
        assert host.poll()[1] == [None, None]
    deadline = time.monotonic() + 60
    while any(process.poll() is None for process in host._ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [process.returncode for process in host._ranks] == [-9, -9]
