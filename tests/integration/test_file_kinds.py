"""Every file that a step reads, as every wrong kind of file: one line that names it, or the step does without it."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.bad_inputs import World, run_recipe
from integration.fuzzing import PRETRAINED, a_world, assert_property, files_of, limits

pytestmark = pytest.mark.slow

ASK_MODEL = ("paraphrase.num_wordings=1", "paraphrase.max_attempts=1", "paraphrase.max_new_tokens=4")
ROW = '{"instruction": "Say it.", "input": "a%d", "output": "b", "task": "t"}\n'
WORDING = '{"task": "animal", "id": "w%d", "text": "Name animal number %d."}\n'
EXTRA = {
    "d.jsonl": "".join(ROW % i for i in range(20)),
    "rows/d.jsonl": "".join(ROW % i for i in range(20)),
    "d.csv": "instruction,input,output\n" + "".join(f"Say it.,a{i},b\n" for i in range(20)),
    "d.json": "[" + ",".join(ROW % i for i in range(20)) + "]",
    "splits/d/tasks/x.json": '{"Definition": ["Say it."], "Instances": ['
    + ",".join(f'{{"input": "a{i}", "output": ["b"]}}' for i in range(20))
    + "]}",
    "splits/d/splits/default/train_tasks.txt": "x\n",
    "w.jsonl": "".join(WORDING % (i, i) for i in range(8)),
    "r.jsonl": "".join(ROW % i for i in range(20)),
    "t.jinja": "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}",
}


@dataclasses.dataclass(frozen=True)
class File:
    """A file, the step that reads it and its words; `own` is kept, other folders of the step are removed before."""

    path: str
    step: str
    words: tuple[str, ...] = ()
    own: bool = False
    optional: tuple[str, ...] = ()  # kinds with which the step may go on


NOTHING = ("missing", "empty", "dangling", "/dev/null")
REPLAY = ("sft.replay=r.jsonl", "sft.replay_share=0.5")
USER_FILES = [
    File("config.toml", "prepare", optional=("empty", "/dev/null")),
    File("d.jsonl", "prepare", ("data.path=d.jsonl",)),
    File("rows/d.jsonl", "prepare", ("data.path=rows",)),
    File("d.csv", "prepare", ("data.path=d.csv",)),
    File("d.json", "prepare", ("data.path=d.json",)),
    File("data/tasks/animal.json", "prepare", optional=("missing",)),
    File("splits/d/splits/default/train_tasks.txt", "prepare", ("data.path=splits/d",), optional=("missing",)),
    File("wordings.jsonl", "paraphrase"),
    File("w.jsonl", "eval", ("eval.wordings_file=w.jsonl", 'eval.models=["sft"]')),
    File("r.jsonl", "sft", REPLAY),
    File("t.jinja", "sample", ("model.chat_template=t.jinja",)),
    File("my-model/config.json", "judge", ("judge.model=my-model",)),
    *(
        File(f"my-model/{name}", "paraphrase", (*PRETRAINED, *ASK_MODEL), optional=optional)
        for name, optional in (
            ("config.json", ()),
            ("tokenizer.json", ()),
            ("tokenizer_config.json", NOTHING),
            ("generation_config.json", NOTHING),
            ("chat_template.jinja", NOTHING),
            ("model.safetensors", ()),
        )
    ),
]
RUN_FILES = [
    *(File(f"runs/r/prepare/{name}", "paraphrase") for name in ("manifest.json", "tasks.jsonl")),
    *(File(f"runs/r/{name}", "sft") for name in ("prepare/examples.jsonl", "paraphrase/wordings.jsonl")),
    *(File(f"runs/r/{name}", "sample") for name in ("sft/manifest.json", "sft/model/config.json")),
    File("runs/r/sample/responses.jsonl", "judge"),
    *(File(f"runs/r/judge/{name}", "rank") for name in ("manifest.json", "verdicts.jsonl")),
    File("runs/r/rank/groups.jsonl", "align"),
    File("runs/r/eval/metrics.json", "report"),
    *(File(f"runs/r/{name}", "report") for name in ("sft/manifest.json", "sft/metrics.jsonl", "eval/manifest.json")),
    File("runs/r/rank/manifest.json", "rank", own=True),
    *(File(f"runs/r/rank/{name}", "rank", own=True) for name in ("config.json", ".attempts.json", ".lock")),
    *(File(f"runs/r/judge/{name}", "remaining", own=True) for name in ("manifest.json",)),
    File("runs/r/sample/shards/00000.jsonl", "sample", own=True),
    File("runs/r/sft/checkpoints/step_000003/checkpoint.json", "sft", own=True),
]


# Wrong kinds


def keep_out(path: Path) -> None:
    """Take all permissions away."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    path.chmod(0)


def put(content: bytes) -> Callable[[Path], None]:
    """Return what puts another file in the place of one."""

    def change(path: Path) -> None:
        path.unlink()
        path.write_bytes(content)

    return change


def edit(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return what puts a changed file in the place of one."""
    return lambda path: put(change(path.read_bytes()))(path)


def link(target: str) -> Callable[[Path], None]:
    """Return what puts a link in the place of a file."""

    def change(path: Path) -> None:
        path.unlink()
        path.symlink_to(path.name if target == "itself" else target)

    return change


def folder(path: Path) -> None:
    """Put a folder that holds a file in the place of a file."""
    path.unlink()
    path.mkdir()
    (path / "x").write_text("x")


def pipe(path: Path) -> None:
    """Put a pipe that nobody writes to in the place of a file."""
    path.unlink()
    os.mkfifo(path)


def listening(path: Path) -> None:
    """Put a socket in the place of a file; its path may be too long for the system."""
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "folder": folder,
    "dangling": link("nowhere"),
    "loop": link("itself"),
    "pipe": pipe,
    "socket": listening,
    "/dev/null": link("/dev/null"),
    "/dev/zero": link("/dev/zero"),
    "/proc/self/mem": link("/proc/self/mem"),
    "no permission": keep_out,
    "empty": put(b""),
    "not UTF-8": edit(lambda content: content[: len(content) // 2] + b"\xff\xfe" + content[len(content) // 2 :]),
    "UTF-16": edit(lambda content: content.decode("latin-1").encode("utf-16")),
    "BOM": edit(lambda content: b"\xef\xbb\xbf" + content),
    "cut": edit(lambda content: content[: len(content) * 2 // 3]),
    "binary": put(bytes(range(256)) * 8),
    "zeros": put(b"\x00" * 4096),
    "packed": put(b"\x1f\x8b\x08\x00" + b"\x01" * 100),
    "one huge line": put(b'{"x": "' + b"x" * 3_000_000 + b'"}'),
    "deep": put(b"[" * 100_000),
    "long number": put(b'{"x": ' + b"9" * 5000 + b"}\n"),
    "a number": put(b"3\n"),
    "null": put(b"null\n"),
    "a list": put(b"[]\n"),
    "an object": put(b"{}\n"),
}
UNREADABLE = ("folder", "loop", "pipe", "socket", "/dev/zero", "/proc/self/mem", "no permission")

# Permissions of files bind root only without two of its capabilities, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
CAPABILITIES, VERSION = 1 << 1 | 1 << 2, 0x20080522


@contextlib.contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Let the permissions of files bind this thread, also when it is root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    before = data[0]
    data[0] &= ~CAPABILITIES
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = before
        assert libc.capset(header, data) == 0


@pytest.fixture(scope="session")
def everything(finished_here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a complete run and every file that a config can name; nobody changes it."""
    folder = tmp_path_factory.mktemp("wrong") / "everything"
    shutil.copytree(finished_here.parent, folder)
    shutil.copytree(finished_here / "r" / "prepare" / "model", folder / "my-model")
    for name, content in EXTRA.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, "utf-8")
    shards = folder / "runs/r/sample/shards"
    shards.mkdir()
    shutil.copyfile(folder / "runs/r/sample/responses.jsonl", shards / "00000.jsonl")
    (folder / "runs/r/rank/.attempts.json").write_text('{"started": 1700000000.0, "spent": 3.5}')
    return folder


def complaint_about(file: File, kind: str, base: Path) -> str:
    """Return what is wrong with how a step takes a file of a wrong kind, "" when nothing is."""
    with a_world(base) as world:
        path = world.folder / file.path
        if not file.own and file.step not in ("report", "remaining"):
            world.remove(file.step)
        elif path.name != "manifest.json" and file.step not in ("report", "remaining"):
            (world.run_folder / file.step / "manifest.json").unlink()
            shutil.rmtree(world.run_folder / file.step / "model", ignore_errors=True)
        KINDS[kind](path)
        before = files_of(world.folder)
        words = {"report": ("runs/r",), "remaining": ("local", "config.toml")}.get(file.step, ("config.toml",))
        with limits(10.0), bound_by_permissions():
            outcome = run_recipe(file.step, *words, *file.words)
        try:
            assert_property(world, outcome, before)
        except AssertionError as error:
            return f"{kind}: {error}"
        finally:
            if path.is_file() and not path.is_symlink():
                path.chmod(0o600)
        if outcome.code == 2 and not any(part in outcome.errors[0] for part in named(file)):
            return f"{kind}: the file is not named: {outcome.errors[0]}"
        must_stop = file in USER_FILES and kind in (*UNREADABLE, *NOTHING) and kind not in file.optional
        if outcome.code == 0 and must_stop:
            return f"{kind}: the step went on without it"
    return ""


def named(file: File) -> tuple[str, ...]:
    """Return what an error about a file must hold, one of them: its name, its folder, or the key that names it."""
    path = Path(file.path)
    keys = tuple(word.partition("=")[0] for word in file.words if "=" in word)
    parents = tuple(str(parent) for parent in path.parents if str(parent) not in (".", "runs", "runs/r"))
    of_template = ("the chat template",) if path.suffix == ".jinja" else ()
    of_config = ("data.path=",) if path.name == "config.toml" else ()  # an empty one is whole, and lacks that key
    return (path.name, *parents, *keys, *of_template, *of_config)


@pytest.mark.parametrize("file", [*USER_FILES, *RUN_FILES], ids=lambda file: f"{file.path} for {file.step}")
def test_every_wrong_kind_of_file(file: File, everything: Path) -> None:
    complaints = [complaint for kind in KINDS if (complaint := complaint_about(file, kind, everything))]
    assert not complaints, "\n\n".join(complaints)


def test_files_of_the_table_are_read(everything: Path) -> None:
    """Every row names a file that is there, and its step runs with it."""
    for file in [*USER_FILES, *RUN_FILES]:
        assert (everything / file.path).is_file(), file.path
    for file in USER_FILES:
        with a_world(everything) as world:
            world.remove(file.step)
            assert run_recipe(file.step, "config.toml", *file.words).code == 0, file
            assert isinstance(world, World)
