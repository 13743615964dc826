"""A working folder with a tiny run in it, and recipes run in this process as their command lines would run.

Relative paths in configs and messages count from the working folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from coalign.recipe import run_step

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("animal", "colour", "first_word")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
CONFIG = """
[run]
name = "r"
[model]
init = "random"
[model.random]
vocab_size = 400
hidden_size = 32
num_layers = 1
num_heads = 2
intermediate_size = 64
context = 256
[data]
path = "data"
max_sft_inputs = 12
max_align_inputs = 4
max_dev_inputs = 3
max_test_inputs = 2
[paraphrase]
files = ["wordings.jsonl"]
num_wordings = 0
num_dev = 2
num_test = 4
[generation]
workers = 0
[train]
eval_every = 0
[sft]
learning_rate = 2e-2
epochs = 0
max_steps = 3
batch_rows = 4
[sample]
wordings_per_input = 2
samples = 2
max_new_tokens = 4
[judge]
allow_weak = true
max_dev_inputs = 6
[align]
epochs = 0
max_steps = 2
batch_groups = 4
[eval]
max_wordings = 4
max_new_tokens = 4
noise_inputs = 0
num_bootstrap = 10
[log]
tensorboard = false
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """Return what a user reads on stderr, line by line, without progress bars."""
        lines = (line.strip() for line in re.split(r"[\r\n]+", self.stderr))
        return [line for line in lines if line and "%|" not in line]


@dataclasses.dataclass(frozen=True)
class World:
    """A working folder (the current one) with config.toml, data and wordings."""

    folder: Path

    @property
    def run_folder(self) -> Path:
        """Return the folder of the run that the config names."""
        return self.folder / "runs" / "r"

    def write(self, name: str, content: bytes | str) -> Path:
        """Write a file below the working folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def remove(self, *steps: str) -> None:
        """Remove steps of the run."""
        for step in steps:
            shutil.rmtree(self.run_folder / step, ignore_errors=True)

    def run(self, step: str, *settings: str) -> Outcome:
        """Run a recipe in this process with the world's config."""
        return run_recipe(step, "config.toml", *settings)

    def outputs(self) -> dict[str, tuple[int, int]]:
        """Return what the steps have produced (inode and size): everything but locks, begun configs, shards, logs."""
        found = {}
        for path in sorted((self.folder / "runs").rglob("*")):
            parts = path.relative_to(self.folder).parts
            passing = {"shards", "checkpoints", "tensorboard"} & set(parts)
            passing |= {"config.json", "deepspeed.json", "metrics.jsonl", ".lock", ".attempts.json"} & {path.name} - {
                "model"
            }
            if path.is_file() and (not passing or "model" in parts):
                found["/".join(parts)] = (path.stat().st_ino, path.stat().st_size)
        return found

    def half_written(self) -> list[str]:
        """Return temporary files and folders that lie about."""
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob(".*.tmp")]

    def manifest(self, step: str) -> Any:
        """Return a step's manifest."""
        return json.loads((self.run_folder / step / "manifest.json").read_text(encoding="utf-8"))


def make_world(folder: Path) -> World:
    """Fill a folder with the config, three tasks and their wordings."""
    world = World(folder)
    world.write("config.toml", CONFIG)
    for task in TASKS:
        world.write(f"data/tasks/{task}.json", (ROOT / "examples/phrasebook/tasks" / f"{task}.json").read_bytes())
    world.write("wordings.jsonl", (ROOT / "examples/phrasebook/wordings.jsonl").read_bytes())
    return world


def losses(folder: Path) -> list[float]:
    """Return the loss after every update of a training step."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


def load_main(step: str) -> Callable[[list[str]], None]:
    """Return the main function of launch/STEP.py."""
    spec = importlib.util.spec_from_file_location(f"recipe_{step}", ROOT / "launch" / f"{step}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[list[str]], None] = module.main
    return main


def run_recipe(step: str, *arguments: str) -> Outcome:
    """Run `python launch/STEP.py ARGUMENTS` in this process and leave the process as it was."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _borrowed_process([step, *arguments]):
        try:
            run_step(load_main(step))
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:
            code = 1
            traceback.print_exc()
    gc.collect()  # what hangs on the exception may hold a lock
    gc.freeze()  # the next collection passes over what is here to stay: the hundred thousands of objects of the engines
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _borrowed_process(argv: list[str]) -> Iterator[None]:
    """Put back what a recipe changes for its whole process: arguments, logging, signals, threads, environment.

    The process group of one rank stays: DeepSpeed remembers it and can't start anew. See `leave_process_group`.
    """
    import torch

    logger, threads, old_argv = logging.getLogger("coalign"), torch.get_num_threads(), sys.argv
    level, handlers, propagate = logger.level, logger.handlers[:], logger.propagate
    handled = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    environment = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    sys.argv = argv
    try:
        yield
    finally:
        sys.argv = old_argv
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
        torch.set_num_threads(threads)
        for number, handler in handled.items():
            signal.signal(number, handler)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def leave_process_group() -> None:
    """End the process group that recipes made in this process; none of them can train here afterwards."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_command(words: list[str], timeout: float = 400, **variables: str) -> Outcome:
    """Run a command of its own in the working folder; `variables` are added to the environment."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment, timeout=timeout, stdin=subprocess.DEVNULL, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def recipe_command(step: str, *arguments: str) -> list[str]:
    """Return the command line that runs a recipe with this Python."""
    return [sys.executable, str(ROOT / "launch" / f"{step}.py"), *arguments]
