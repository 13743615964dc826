"""One private Ray cluster serves all steps of launch/local.sh, nobody else can use it, and it ends with the script."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import LIMIT_SECONDS, Clusters, Run, Watched, random_delay, until

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.timeout(900)]


def test_one_cluster_serves_all_steps(watched: Watched) -> None:
    """One cluster was started, the four steps that generate were connected to it, and its folder is gone."""
    clusters = watched.clusters
    assert clusters.heads and len(clusters.holders()) == 1
    addresses = re.findall(r"2 Ray workers on (\S+),", watched.printed)
    assert len(addresses) == 4 and len(set(addresses)) == 1 and addresses[0].startswith("127.0.0.1:")
    assert not any(folder.exists() for folder in clusters.folders)


def test_nobody_else_can_use_it(watched: Watched) -> None:
    """It listens on 127.0.0.1 alone; its token is fresh and in no file, log or command line."""
    clusters = watched.clusters
    (token,) = clusters.tokens
    assert len(token) == 64
    assert not clusters.breaches
    for place in (watched.run.path, watched.run.path.parent / "printed"):
        assert not clusters.files_with_token(place)


def test_a_failed_step_ends_the_cluster(copy_of: Callable[..., Run]) -> None:
    """The script leaves with the step's exit status, and `wait` sees to it that no process is left."""
    run = copy_of("judge", "rank", "align", "eval")
    clusters = Clusters()
    command = run.start_all("judge.allow_weak=false", "judge.min_quality=1.0")
    clusters.watch(command)
    done = command.wait()
    assert done.returncode == 2
    assert "the step judge failed (exit status 2)" in done.stderr
    assert len(clusters.holders()) == 1 and not any(folder.exists() for folder in clusters.folders)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["prepare", "sample", "align"])  # Ray starts, Ray works, DeepSpeed works
def test_a_killed_script_leaves_nothing(step: str, copy_of: Callable[..., Run]) -> None:
    """Killed by SIGKILL at any moment, step and cluster end, and nothing keeps the next step from going on."""
    order = ("prepare", "paraphrase", "sft", "sample", "judge", "rank", "align", "eval")
    run = copy_of(*order[order.index(step) :])
    command = run.start_all()
    printed = command.folder / f"{command.tag}.out"
    until(lambda: f"== {step}\n" in printed.read_text("utf-8"), LIMIT_SECONDS, command.output, command.end)
    random_delay(6.0)
    folders = [Path("/tmp", found) for p in command.all("coalign-ray-") for found in _folders(p.cmdline())]
    command.kill()
    command.wait()
    assert not any(folder.exists() for folder in folders)
    if step == "align":
        run.step("align", ranks=2)


def _folders(words: list[str]) -> list[str]:
    return re.findall(r"coalign-ray-[^/ ]+", " ".join(words))
