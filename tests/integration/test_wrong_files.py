"""Files that can't be opened or read, through the recipes: every cause for every file that some step reads.

Each ends in one clear line that names the file, at once: nothing waits for a pipe or reads a device.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.bad_inputs import Outcome, World

SECONDS = 60  # the patience of these tests; what hangs is ended


@pytest.fixture(autouse=True)
def _nothing_hangs() -> Iterator[None]:
    def end(*_: Any) -> None:
        raise TimeoutError("it waits for ever")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(path.parent, os.O_RDONLY)  # a socket's name must be short
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


# What lies in a file's place, and what the line says of it.
CAUSES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (as_pipe, "a pipe, a socket or a device"),
    "socket": (as_socket, "a pipe, a socket or a device"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a pipe, a socket or a device"),
    "folder": (lambda path: path.mkdir(), "folder"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "no such"),
    "loop of links": (as_loop, ""),
    "read error": (lambda path: path.symlink_to("/proc/self/mem"), "nput/output error"),
    "not UTF-8": (lambda path: path.write_bytes(b"\xff\xfe"), "UTF-8"),
    "compressed": (lambda path: path.write_bytes(b"\x1f\x8b\x08\x00"), "unpack"),
    "nested too deeply": (lambda path: path.write_text("[" * 100_000), "malformed|too deep"),
    "number too long": (lambda path: path.write_text('{"instruction": ' + "1" * 5000 + "}"), "malformed"),
}
TEXT_ALONE = ("nested too deeply", "number too long")  # of files that hold JSON or TOML


@dataclasses.dataclass(frozen=True)
class Read:
    """A file that a step reads: where it lies, and the settings that name it."""

    step: str
    file: str
    settings: tuple[str, ...] = ()
    is_text: bool = False  # neither JSON nor TOML, so that nothing is nested


READS = {
    "config": Read("rank", "config.toml"),
    "rows": Read("prepare", "d.jsonl", ("data.path=d.jsonl",)),
    "rows in a folder": Read("prepare", "d/rows.jsonl", ("data.path=d",)),
    "task": Read("prepare", "data/tasks/animal.json"),
    "list of tasks": Read("prepare", "data/splits/default/train_tasks.txt", is_text=True),
    "CSV": Read("prepare", "d.csv", ("data.path=d.csv",), is_text=True),
    "JSON table": Read("prepare", "d.json", ("data.path=d.json",)),
    "wordings": Read("paraphrase", "w.jsonl", ('paraphrase.files=["w.jsonl"]',)),
    "wordings of eval": Read("eval", "w.jsonl", ("eval.wordings_file=w.jsonl",)),
    "replay": Read("sft", "r.jsonl", ("sft.replay=r.jsonl", "sft.replay_share=0.5")),
    "template": Read("sft", "t.jinja", ("model.chat_template=t.jinja",), is_text=True),
    "rows of a step": Read("paraphrase", "runs/r/prepare/tasks.jsonl"),
}


def assert_one_line(outcome: Outcome, *says: str) -> str:
    assert outcome.code == 2, f"exit status {outcome.code}\n{outcome.stdout[-1000:]}\n{outcome.stderr[-3000:]}"
    assert len(outcome.errors) == 1, outcome.stderr
    line = outcome.errors[0]
    assert line.startswith("error: ")
    for words in says:
        assert any(part in line for part in words.split("|")), f"{words!r} is not in: {line}"
    return line


@pytest.mark.parametrize("what", READS)
def test_file_that_cannot_be_read(what: str, run: World) -> None:
    """All causes of one file after another, in one working folder."""
    read = READS[what]
    path = run.folder / read.file
    path.parent.mkdir(parents=True, exist_ok=True)
    for cause, (put, says) in CAUSES.items():
        if read.is_text and cause in TEXT_ALONE:
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        put(path)
        run.remove(read.step)
        outcome = run.run(read.step, *read.settings)
        assert_one_line(outcome, path.name if what != "list of tasks" else ".txt|task", says), cause
