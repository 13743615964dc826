"""Files that can't be opened or read, through the recipes: every cause for every file that some step reads.

Each ends in one clear line that names the file, at once: nothing waits for a pipe or reads a device.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coalign.data import spool
from coalign.errors import UserError
from coalign.files import list_folder, open_file, read_text
from coalign.runs.step_folder import StepFolder
from integration.bad_inputs import Outcome, World, run_recipe

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
    "number too long": (
        lambda path: path.write_text('{"instruction": ' + "1" * 5000 + "}"),
        "malformed|the columns are",
    ),
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
        if what == "rows of a step":  # whatever lies there, the way out is the same
            says = "is not what the step wrote; run prepare again"
        assert_one_line(outcome, path.name if what != "list of tasks" else ".txt|task", says), cause


# Values that name a path


LONG = "x" * 300
VALUES = {
    "name too long": (LONG, "too long"),
    "loop of links": ("loop", "no such|circle"),
    "below a file": ("config.toml/x", "no such|ot a directory|a file"),
    "missing": ("nowhere/x", "no such|hub"),
}
NAMED = {
    "config": ("rank", "{}", ()),
    "data.path": ("prepare", "data.path={}", ()),
    "data.path as rows": ("prepare", "data.path={}", ("data.format=jsonl",)),
    "wordings": ("paraphrase", 'paraphrase.files=["{}"]', ()),
    "wordings of eval": ("eval", "eval.wordings_file={}", ()),
    "replay": ("sft", "sft.replay={}", ("sft.replay_share=0.5",)),
    "template": ("sft", "model.chat_template={}", ()),
    "model": ("sft", "model.path={}", ("model.init=pretrained",)),
    "borrowed step": ("sft", "run.inputs.paraphrase={}", ()),
    "judge": ("judge", "judge.model={}", ()),
    "judge of agreement": ("eval", "eval.agreement={}", ()),
    "model under test": ("eval", "eval.models.other={}", ()),
}


@pytest.mark.parametrize("what", NAMED)
def test_path_that_leads_nowhere(what: str, run: World) -> None:
    step, word, settings = NAMED[what]
    as_loop(run.folder / "loop")
    run.remove(step)
    for cause, (value, _) in VALUES.items():
        words = [word.format(value), *settings]
        outcome = run_recipe(step, *words) if what == "config" else run.run(step, *words)
        line = assert_one_line(outcome)
        assert len(line) < 1500, (cause, line)
        assert value in line or (len(value) > 200 and value[:100] in line), (cause, line)


@pytest.mark.parametrize("folder", ["/proc", "config.toml", "loop", LONG, "/dev/null/x"])
def test_run_folder_that_cannot_be_made(folder: str, world: World) -> None:
    as_loop(world.folder / "loop")
    assert_one_line(world.run("prepare", f"run.folder={folder}"), "run.folder|too long")


def test_run_folder_on_a_read_only_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """EROFS is no PermissionError; it comes from mkdir, or for a folder that is there from the lock."""

    def read_only(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        assert_one_line(world.run("prepare"), "runs/r", "ead-only file system", "run.folder")
    assert world.run("prepare").code == 0


@pytest.fixture
def nobody() -> Iterator[None]:
    """Another user's eyes; root may read everything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    yield
    os.seteuid(os.getuid())


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach."""
    folder = Path(tempfile.mkdtemp(prefix="coalign-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_forbidden_files(open_folder: Path, request: pytest.FixtureRequest) -> None:
    """Permission denied: for a file, for what is below a closed folder, and for a folder to list."""
    closed = open_folder / "closed"
    closed.mkdir()
    for path in (open_folder / "file", closed / "file"):
        path.write_text("x")
        path.chmod(0o000)
    closed.chmod(0o000)
    request.getfixturevalue("nobody")
    for path in (open_folder / "file", closed / "file"):
        with pytest.raises(UserError, match=r"file: permission denied; check data\.path"):
            read_text(path, "data.path")
    with pytest.raises(UserError, match="closed: permission denied"):
        list_folder(closed)
    with pytest.raises(UserError, match=r"step can't be written to \(.*: permission denied\); set run\.folder"):
        StepFolder(open_folder / "step", {}, {}).open()


def test_names_of_files_that_are_not_utf8(world: World) -> None:
    names = {b"data/tasks/\xff.json": (), b"d/\xff.jsonl": ("data.path=d",), b"h/\xff.csv": ("data.path=h",)}
    for name, settings in names.items():
        path = Path(os.fsdecode(os.path.join(os.fsencode(world.folder), name)))  # noqa: PTH118  bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        assert_one_line(world.run("prepare", *settings), "\\udcff", "not UTF-8; rename it")


def test_error_that_nobody_caught_names_the_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The net of run_step: an OSError that nobody has caught is one line when it has a file's name."""

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "some/file")

    monkeypatch.setattr("coalign.runs.step_folder.write_json", fail)
    assert_one_line(world.run("prepare"), "some/file: permission denied; check the path")


def test_full_disk_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows kept before the step's folder exists: the disk is that of run.folder, not the working folder's."""

    class Full:
        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class FullSpool(spool.Spool[Any]):
        def __init__(self, kind: type[Any], folder: Path | None = None) -> None:
            super().__init__(kind, folder)
            self._stream: Any = Full()

    monkeypatch.setattr("coalign.data.sources.Spool", FullSpool)
    (world.folder / "disk").mkdir()
    outcome = world.run("prepare", "run.folder=disk")
    assert_one_line(outcome, f"no space left on the disk of {world.folder / 'disk'};", "finished work is kept")


def test_file_without_its_mark(tmp_path: Path) -> None:
    """The helper hands out what Path.open would."""
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbfab\n")
    with open_file(path) as stream:
        assert stream.read() == path.read_bytes()
    assert read_text(path) == "ab\n"
