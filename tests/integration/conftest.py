"""A finished tiny run, made once and shared; a test that changes something gets a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import LIMIT_SECONDS, Clusters, Run, started


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Clusters]:
    """Run all eight steps once, with two Ray workers and two DeepSpeed ranks, and watch the clusters meanwhile."""
    run = Run(tmp_path_factory.mktemp("finished") / "whole")
    command = run.start_all()
    clusters = Clusters()
    clusters.watch(command)
    done = command.wait(2 * LIMIT_SECONDS)
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return run, clusters


@pytest.fixture(scope="session")
def finished(watched: tuple[Run, Clusters]) -> Run:
    """Return a run whose eight steps are complete; nobody changes this folder."""
    return watched[0]


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
