"""Two finished runs, each made once and shared; a test that changes something gets a copy.

`finished` comes from the real commands, with ranks and workers; `run` is a smaller one, its recipes ran in a test's own
process.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import LIMIT_SECONDS, STEPS, Clusters, Run, Watched, started

from integration.bad_inputs import World, leave_process_group, make_world

MakeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def watched(made_once: MakeOnce) -> Watched:
    """Run all eight steps once, with two Ray workers and two DeepSpeed ranks, and watch the clusters meanwhile."""

    def fill(folder: Path) -> None:
        clusters = Clusters()
        command = Run(folder / "whole").start_all()
        clusters.watch(command)
        done = command.wait(2 * LIMIT_SECONDS)
        assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        (folder / "seen.json").write_text(json.dumps({"printed": done.stdout, "clusters": clusters.to_values()}))

    folder = made_once("finished_commands", fill)
    seen = json.loads((folder / "seen.json").read_text("utf-8"))
    return Watched(Run(folder / "whole"), seen["printed"], Clusters.from_values(seen["clusters"]))


@pytest.fixture(scope="session")
def finished(watched: Watched) -> Run:
    """Return a run whose eight steps are complete; nobody changes this folder."""
    return watched.run


@pytest.fixture(autouse=True)
def _leave_nothing_running() -> Iterator[None]:
    """End what a failed test has left running."""
    yield
    while started:
        started.pop().end()


@pytest.fixture
def copy_of(finished: Run, tmp_path: Path) -> Callable[..., Run]:
    """Return a function that copies the finished run without some steps."""

    def copy(*without: str, name: str = "copy") -> Run:
        target = tmp_path / name
        shutil.copytree(
            finished.path, target, ignore=lambda folder, _: without if Path(folder) == finished.path else ()
        )
        return Run(target)

    return copy


@pytest.fixture(scope="session")
def _one_rank() -> Iterator[None]:
    """Leave the process group of the recipes that have trained in this process."""
    yield
    leave_process_group()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _one_rank: None) -> World:
    """A working folder without a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("coalign.runs.step_folder.LOCK_WAIT_SECONDS", 0.3)
    return make_world(tmp_path)


@pytest.fixture(scope="session")
def finished_here(made_once: MakeOnce, _one_rank: None) -> Path:
    """The runs folder of a complete small run; nobody changes it."""

    def fill(folder: Path) -> None:
        world, old = make_world(folder), Path.cwd()
        os.chdir(folder)
        try:
            for step in STEPS:
                outcome = world.run(step)
                assert outcome.code == 0, f"{step}: {outcome.stdout[-2000:]}{outcome.stderr[-2000:]}"
        finally:
            os.chdir(old)

    return made_once("finished_here", fill) / "runs"


@pytest.fixture
def run(world: World, finished_here: Path) -> World:
    """A working folder with a complete run."""
    shutil.copytree(finished_here, world.folder / "runs")
    return world
