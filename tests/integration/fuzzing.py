"""What must hold for every input, and how examples are made and run: see `assert_property`.

`FUZZ_EXAMPLES` is the number of examples in all, shared out among the properties. Without it the examples are 2,000 and
always the same; with it every session draws others.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis

from coalign.runs.digests import digest_outputs
from integration.bad_inputs import Outcome, World, run_recipe

NUM_EXAMPLES = 2000
LIMIT_SECONDS = 20.0  # an example takes a tenth of a second; what takes this long hangs
LIMIT_BYTES = 3 << 30  # of memory, beyond what the process has already
PRETRAINED = ("model.init=pretrained", "model.path=my-model")
BEGUN = {".lock", ".attempts.json", "config.json", "deepspeed.json", "metrics.jsonl"}  # of a step that may go on
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they turn the direction of what follows
EXPLAINING = {"dropped.jsonl"}  # rank writes it before it says that nothing is left


def examples(share: float, **options: Any) -> hypothesis.settings:
    """Return the settings of a property that gets this share of all examples."""
    asked = os.environ.get("FUZZ_EXAMPLES", "")
    return hypothesis.settings(
        max_examples=max(1, round(share * int(asked or NUM_EXAMPLES))),
        derandomize=not asked,
        database=None,
        deadline=None,  # `limits` has its own
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        **options,
    )


class TooSlow(BaseException):
    """The time of an example is over; no `except Exception` of the code under test catches it."""


@contextlib.contextmanager
def limits(seconds: float = LIMIT_SECONDS) -> Iterator[None]:
    """End what hangs by TooSlow, and what takes all memory by MemoryError."""

    def stop(number: int, frame: Any) -> None:
        raise TooSlow(f"no end within {seconds:g} s")

    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(seconds, lambda: signal.pthread_kill(main, signal.SIGUSR2))
    timer.daemon = True
    before, (soft, hard) = signal.signal(signal.SIGUSR2, stop), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, hard))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGUSR2, before)


@contextlib.contextmanager
def a_world(like: Path) -> Iterator[World]:
    """Enter a new working folder with what another holds, by hard links: replace a file, never write into it."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        # Some levels down and with a home of its own: `..` and `~` stay inside.
        folder = Path(name, "a", "b", "c", "work")
        shutil.copytree(like, folder, copy_function=_link, symlinks=True)
        home = os.environ.get("HOME")
        os.environ["HOME"] = str(folder / "home")
        os.chdir(folder)
        try:
            yield World(folder)
        finally:
            os.chdir(here)
            os.environ.pop("HOME") if home is None else os.environ.__setitem__("HOME", home)


def _link(source: str, target: str) -> None:
    if Path(source).name == ".lock":  # a step writes into it
        shutil.copyfile(source, target)
    else:
        os.link(source, target)


def replace(path: Path, content: bytes) -> None:
    """Give a path another file with this content, whatever else is linked to the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def files_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return {path: inode, size, time of change} of all files below a folder but those of a step that may go on."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            inside = path.relative_to(folder)
            passing = name in BEGUN and "model" not in inside.parts
            if passing or {"shards", "checkpoints", "tensorboard", ".cache"} & {*inside.parts}:
                continue
            stat = path.lstat()
            found[str(inside)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


def run(world: World, step: str, *words: str) -> Outcome:
    """Run a recipe within the limits and assert what must hold for every input."""
    before = files_of(world.folder)
    with limits():
        outcome = run_recipe(step, *words)
    assert_property(world, outcome, before)
    return outcome


def assert_property(world: World, outcome: Outcome, before: dict[str, tuple[int, int, int]]) -> None:
    """Assert: exit status 0 or 2, no traceback, one line if 2, nothing half-written, old outputs as they were."""
    shown = f"exit status {outcome.code}\n{outcome.stdout[-500:]}\n{outcome.stderr[-3000:]}"
    assert outcome.code in (0, 2), shown
    assert "Traceback" not in outcome.stderr, shown
    after = files_of(world.folder)
    assert not [name for name in after if Path(name).name.endswith(".tmp")], "temporary files were left behind"
    if outcome.code == 2:
        assert len(outcome.errors) == 1 and outcome.errors[0].startswith("error: "), shown
        commanding = [c for c in outcome.errors[0] if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in BIDI]
        assert not commanding, f"would command a terminal: {outcome.errors[0]!r}"
        changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        changed -= {name for name in changed if Path(name).name in EXPLAINING and name not in before}
        assert not changed, f"refused, and yet written or removed: {sorted(changed)}; {outcome.errors[0]}"
    else:
        assert "error: " not in outcome.stderr, shown
        for path in {Path(name) for name in after if Path(name).name == "manifest.json"} - {*map(Path, before)}:
            assert_complete(world.folder / path.parent)


def assert_complete(step: Path) -> None:
    """Assert that a step's outputs are those that its manifest names, and valid JSON."""
    manifest = json.loads((step / "manifest.json").read_text("utf-8"))
    named = {name: digest for name, digest in manifest["outputs"].items() if name.endswith(".jsonl")}
    assert named == digest_outputs(step), f"{step} does not hold the outputs of its manifest"
    for name in named:
        for line in (step / name).read_bytes().splitlines():  # bytes: texts may hold other ends of line
            json.loads(line, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def digests(world: World, step: str) -> dict[str, str]:
    """Return the digests of the outputs of a step of the run."""
    found: dict[str, str] = world.manifest(step)["outputs"]
    return found


def without_encoding_ahead() -> None:
    """Keep steps from starting a process that encodes rows for the next one."""
    module = sys.modules["coalign.runs.encode_ahead"]
    run_command: Callable[..., int] = lambda *_: 0  # noqa: E731
    module.__dict__["run_command"] = run_command
