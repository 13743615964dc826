"""How these tests run the real commands: in processes of their own, with a limit on time, leaving none behind.

Every process that a command starts carries a tag in its environment, so that none can hide, whoever its parent is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("tiny.toml")
STEPS = ("prepare", "paraphrase", "sft", "sample", "judge", "rank", "align", "eval")
TAG = "COALIGN_TEST_TAG"
LIMIT_SECONDS = 240.0
started: list[Command] = []


@dataclasses.dataclass
class Command:
    """A command at work; `wait` returns its outcome after everything it started has ended."""

    process: subprocess.Popen[bytes]
    tag: str
    folder: Path

    def all(self, word: str = "") -> list[psutil.Process]:
        """Return its living processes, those whose command line holds `word`, oldest first."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get(TAG) == self.tag and process.status() != psutil.STATUS_ZOMBIE
                if mine and word in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                continue
        return sorted(found, key=lambda process: process.create_time())

    def actors(self) -> list[psutil.Process]:
        """Return its Ray actors."""
        return [process for process in self.all("ray::") if "ray::IDLE" not in " ".join(process.cmdline())]

    def ranks(self, step: str) -> list[psutil.Process]:
        """Return the training processes, rank 0 first."""
        found = [process for process in self.all(f"launch/{step}.py") if "RANK" in process.environ()]
        return sorted(found, key=lambda process: int(process.environ()["RANK"]))

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the command itself, not to what it started."""
        self.process.send_signal(number)

    def wait(self, seconds: float = LIMIT_SECONDS) -> subprocess.CompletedProcess[str]:
        """Return the outcome; fail when the command takes too long or leaves a process behind."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"{self.process.args} took longer than {seconds:.0f} s:\n{self.output()}") from None
        left = lambda: f"processes left behind: {self._left()}\n{self.output()}"  # noqa: E731
        until(lambda: not self.all(), 60, left, self.end, 0.1)  # reading all environments takes what they need to end
        out, err = ((self.folder / f"{self.tag}.{name}").read_text("utf-8", "replace") for name in ("out", "err"))
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, out, err)

    def output(self) -> str:
        """Return the end of what it printed so far."""
        texts = ((self.folder / f"{self.tag}.{name}").read_text("utf-8", "replace") for name in ("out", "err"))
        return "\n".join(text[-3000:] for text in texts)

    def end(self) -> None:
        """Kill whatever is left of it."""
        for process in self.all():
            process.kill()

    def _left(self) -> list[str]:
        return [" ".join(process.cmdline())[:200] for process in self.all()]


@dataclasses.dataclass
class Clusters:
    """What was seen of the Ray clusters that a command has started: head processes, folders, tokens, breaches."""

    heads: set[int] = dataclasses.field(default_factory=set)
    folders: set[Path] = dataclasses.field(default_factory=set)
    tokens: set[str] = dataclasses.field(default_factory=set)
    breaches: set[str] = dataclasses.field(default_factory=set)

    def to_values(self) -> dict[str, list[Any]]:
        """Return what JSON can hold of it."""
        return {
            "heads": sorted(self.heads),
            "folders": sorted(map(str, self.folders)),
            "tokens": sorted(self.tokens),
            "breaches": sorted(self.breaches),
        }

    @classmethod
    def from_values(cls, values: dict[str, list[Any]]) -> Clusters:
        """Return what `to_values` was asked of."""
        folders = {Path(name) for name in values["folders"]}
        return cls(set(values["heads"]), folders, set(values["tokens"]), set(values["breaches"]))

    def holders(self) -> set[str]:
        """Return the process of every holder, which stands in the name of its folders.

        On a machine too busy for Ray a holder tries again, with another head and folder.
        """
        return {folder.name.split("-")[2] for folder in self.folders}

    def watch(self, command: Command, seconds: float = 2 * LIMIT_SECONDS) -> None:
        """Look at a command's processes until it ends."""
        deadline = time.monotonic() + seconds
        while command.process.poll() is None and time.monotonic() < deadline:
            for process in command.all():
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    self._look_at(process)
            for folder in self.folders:
                self._look_into(folder)
            time.sleep(1.0)

    def _look_at(self, process: psutil.Process) -> None:
        words = " ".join(process.cmdline())
        if process.name() == "gcs_server":
            self.heads.add(process.pid)
            self.tokens.add(process.environ()["RAY_AUTH_TOKEN"])
            self.folders |= {Path("/tmp", found) for found in re.findall(r"coalign-ray-[^/ ]+", words)}
        self.breaches |= {f"token in a command line: {words[:80]}" for token in self.tokens if token in words}
        if "gcs_server" in words or "raylet" in words or "ray" in process.name():
            for socket_of in process.net_connections("inet"):
                if socket_of.status == psutil.CONN_LISTEN and not socket_of.laddr.ip.endswith(("127.0.0.1", "::1")):
                    self.breaches.add(f"{process.name()} listens on {socket_of.laddr.ip}")

    def _look_into(self, folder: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_IMODE(folder.stat().st_mode) != 0o700:
                self.breaches.add(f"others can read {folder}")
        self.breaches |= {f"token in {path}" for path in self.files_with_token(folder)}

    def files_with_token(self, folder: Path) -> list[Path]:
        """Return the files under a folder that hold one of the tokens."""
        found = []
        for path in (Path(place, name) for place, _, names in os.walk(folder) for name in names):
            with contextlib.suppress(OSError):  # Ray removes some while one looks
                if path.is_file() and path.stat().st_size < 2**24:
                    content = path.read_bytes()
                    found += [path for token in self.tokens if token.encode() in content]
        return found


def until(
    happened: Callable[[], bool],
    seconds: float,
    what: Callable[[], str],
    give_up: Callable[[], None] | None = None,
    interval: float = 0.005,
) -> None:
    """Wait until something has happened, looking every so many seconds; fail after `seconds`, saying `what`."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            message = what()
            if give_up:
                give_up()
            raise AssertionError(message)
        time.sleep(interval)


def start(arguments: list[str], folder: Path, env: dict[str, str] | None = None) -> Command:
    """Start a command in the repository root; what it prints goes to files in `folder`."""
    tag = uuid.uuid4().hex[:12]
    own = {
        TAG: tag,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{tag}.out").open("wb") as out, (folder / f"{tag}.err").open("wb") as err:
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=os.environ | own | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    started.append(Command(process, tag, folder))
    return started[-1]


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def step_command(step: str, *settings: str, ranks: int = 0) -> list[str]:
    """Return a step's command line: by the deepspeed launcher when ranks are asked for."""
    script = [f"launch/{step}.py", str(CONFIG.relative_to(ROOT)), *settings]
    if not ranks:
        return [sys.executable, *script]
    return ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), "--log_level", "error", *script]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder and the commands on it."""

    path: Path

    @property
    def place(self) -> list[str]:
        """Return the settings that say where it lies."""
        return [f"run.folder={self.path.parent}", f"run.name={self.path.name}"]

    def start(self, step: str, *settings: str, ranks: int = 0, env: dict[str, str] | None = None) -> Command:
        """Start a step."""
        command = step_command(step, *self.place, *settings, ranks=ranks)
        return start(command, self.path.parent / "printed", env)

    def step(self, step: str, *settings: str, ranks: int = 0, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a step to its end and return its outcome; fail when the exit status is another than `code`."""
        done = self.start(step, *settings, ranks=ranks).wait()
        assert done.returncode == code, f"exit status {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def start_all(self, *settings: str, ranks: int = 2) -> Command:
        """Start launch/local.sh."""
        command = ["bash", "launch/local.sh", str(CONFIG.relative_to(ROOT)), *self.place, *settings]
        return start(command, self.path.parent / "printed", {"RANKS": str(ranks)})

    def all_steps(self, *settings: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
        """Run launch/local.sh to its end and return its outcome."""
        done = self.start_all(*settings, ranks=ranks).wait(2 * LIMIT_SECONDS)
        assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def manifest(self, step: str) -> dict[str, Any]:
        """Return a complete step's manifest."""
        manifest: dict[str, Any] = json.loads((self.path / step / "manifest.json").read_text("utf-8"))
        return manifest

    def complete(self, step: str) -> bool:
        """Return whether a step is complete."""
        return (self.path / step / "manifest.json").exists()

    def curve(self, step: str) -> dict[int, float]:
        """Return the loss after every update; fail when an update was logged twice."""
        lines = (self.path / step / "metrics.jsonl").read_text("utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
        curve = {row["step"]: row["loss"] for row in rows}
        assert len(curve) == len(rows), "an update is in metrics.jsonl twice"
        return curve


@dataclasses.dataclass(frozen=True)
class Watched:
    """A finished run, what its command printed, and what was seen of its clusters meanwhile."""

    run: Run
    printed: str
    clusters: Clusters


def random_delay(longest: float) -> float:
    """Sleep for a random time, print it with its seed, and return it; COALIGN_TEST_SEED=N repeats it."""
    seed = int(os.environ.get("COALIGN_TEST_SEED", random.SystemRandom().randrange(10**6)))
    seconds = random.Random(seed).uniform(0, longest)
    print(f"killing {seconds:.3f} s later (COALIGN_TEST_SEED={seed})")
    time.sleep(seconds)
    return seconds


def assert_same_curve(found: dict[int, float], expected: dict[int, float], tolerance: float) -> None:
    """Fail unless both runs made the same updates with the same losses."""
    assert found.keys() == expected.keys()
    assert len(found) >= 50
    worst = max(found, key=lambda step: abs(found[step] - expected[step]))
    assert abs(found[worst] - expected[worst]) <= tolerance, f"update {worst}: {found[worst]}, not {expected[worst]}"


def assert_same_weights(found: Path, expected: Path, tolerance: float) -> None:
    """Fail unless two model folders hold the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    mine, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (found, expected))
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], rtol=0, atol=tolerance), name


def assert_same_files(found: Path, expected: Path, names: list[str]) -> None:
    """Fail unless the named files of two step folders are byte-identical."""
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
