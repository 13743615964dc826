"""Processes killed at random points, cut checkpoints, other numbers of ranks and workers: the result stays the same.

Each test takes steps away from a copy of the finished run, makes them again under trouble, and compares the two.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from commands import (
    LIMIT_SECONDS,
    Command,
    Run,
    assert_same_curve,
    assert_same_files,
    assert_same_weights,
    random_delay,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LATER = {
    "paraphrase": ("sft", "sample", "judge", "rank", "align", "eval"),
    "sft": ("sample", "judge", "rank", "align", "eval"),
    "sample": ("judge", "rank", "align", "eval"),
    "judge": ("rank", "align", "eval"),
    "align": ("eval",),
    "eval": (),
}
OUTPUTS = {
    "paraphrase": ["wordings.jsonl", "dropped.jsonl"],
    "sample": ["responses.jsonl", "dropped.jsonl"],
    "judge": ["verdicts.jsonl", "dropped.jsonl"],
    "eval": ["answers.jsonl", "dropped.jsonl"],
}
ATTEMPTS = 6


def shards_of(run: Run, step: str) -> int:
    """Return the number of shards that a step has written."""
    return len(list((run.path / step / "shards").glob("*.jsonl")))


def checkpoints_of(run: Run, step: str) -> list[Path]:
    """Return a step's checkpoints, oldest first."""
    return sorted((run.path / step / "checkpoints").glob("step_*"))


def interrupt(
    start: Callable[[], Command],
    run: Run,
    step: str,
    begun: Callable[[], bool],
    hit: Callable[[Command], None],
    longest: float,
    done: str = "manifest.json",
) -> None:
    """Hit a step at a random moment after it has begun, and leave it with nothing running and no file `done`.

    A step that got so far before the blow is no test: then the delay gets shorter and it starts anew.
    """
    for _ in range(ATTEMPTS):
        command = start()
        happened = lambda command=command: begun() or command.process.poll() is not None  # noqa: E731
        until(happened, LIMIT_SECONDS, command.output, command.end)
        random_delay(longest)
        hit(command)
        command.wait()
        if not (run.path / step / done).exists():
            return
        shutil.rmtree(run.path / step)
        longest /= 4
    raise AssertionError(f"{step} was always done before the blow")


@pytest.mark.ray
@pytest.mark.parametrize(("step", "workers"), [("paraphrase", 2), ("eval", 0)])  # sample: below
def test_a_killed_driver_goes_on_at_the_missing_shards(
    step: str, workers: int, copy_of: Callable[..., Run], finished: Run
) -> None:
    """The same command makes only what is missing, and the files are those of an undisturbed run."""
    run = copy_of(step, *LATER[step])
    interrupt(lambda: run.start(step), run, step, lambda: shards_of(run, step) > 0, Command.kill, 0.5)
    assert shards_of(run, step) > 0
    done = run.step(step, f"generation.workers={workers}")
    assert "resuming" in done.stdout and "shards are done already" in done.stdout
    assert_same_files(run.path / step, finished.path / step, OUTPUTS[step])
    assert run.manifest(step)["digest"] == finished.manifest(step)["digest"]


@pytest.mark.ray
def test_every_actor_killed_once_changes_nothing(copy_of: Callable[..., Run], finished: Run) -> None:
    """All actors of the judge die at random moments; how is printed, the verdicts are those of an undisturbed run."""
    run = copy_of("judge", *LATER["judge"])
    command = run.start("judge")
    until(lambda: shards_of(run, "judge") > 0, LIMIT_SECONDS, command.output, command.end)
    victims = command.actors()
    for victim in victims:
        random_delay(0.3)
        victim.kill()
    assert not run.complete("judge")
    done = command.wait()
    assert done.returncode == 0
    for victim in victims:
        assert re.search(rf"process {victim.pid} on \S+ ended: killed by SIGKILL \(exit status -9\)", done.stdout)
    assert_same_files(run.path / "judge", finished.path / "judge", OUTPUTS["judge"])


@pytest.mark.ray
def test_another_number_of_workers_goes_on_with_the_same_shards(copy_of: Callable[..., Run], finished: Run) -> None:
    """Two workers begin, one goes on, this process alone ends it: byte for byte the undisturbed result."""
    run = copy_of("sample", *LATER["sample"])
    interrupt(lambda: run.start("sample"), run, "sample", lambda: shards_of(run, "sample") > 0, Command.kill, 0.3)
    before = shards_of(run, "sample")
    command = run.start("sample", "generation.workers=1")
    until(lambda: shards_of(run, "sample") > before, LIMIT_SECONDS, command.output, command.end)
    command.kill()
    command.wait()
    assert not run.complete("sample")
    run.step("sample", "generation.workers=0")
    assert_same_files(run.path / "sample", finished.path / "sample", OUTPUTS["sample"])


def kill_rank(step: str, number: int) -> Callable[[Command], None]:
    """Return what kills one rank of a training command."""

    def hit(command: Command) -> None:
        for process in command.ranks(step)[number : number + 1]:
            process.kill()

    return hit


def kill_helper(command: Command) -> None:
    """Kill the process between the deepspeed command and its ranks."""
    for process in command.all("deepspeed.launcher.launch"):
        process.kill()


def newest(run: Run, step: str) -> int:
    """Return the update of a step's newest checkpoint, 0 without one."""
    return max((int(path.name.removeprefix("step_")) for path in checkpoints_of(run, step)), default=0)


@pytest.mark.deepspeed
def test_training_killed_again_and_again_ends_with_the_same_model(copy_of: Callable[..., Run], finished: Run) -> None:
    """A rank, the launcher, its helper, a rank that writes the model: all processes end, nothing looks complete.

    Each time the same command goes on after the newest checkpoint, and at last gives the same curve and model.
    """
    run = copy_of("align", *LATER["align"])
    for hit in (kill_rank("align", 1), Command.kill, kill_helper):
        before = newest(run, "align")
        begun = lambda before=before: newest(run, "align") > before  # noqa: E731
        interrupt(lambda: run.start("align", ranks=2), run, "align", begun, hit, 0.3, "model")
    writing = run.path / "align" / ".model.tmp"
    interrupt(lambda: run.start("align", ranks=2), run, "align", writing.exists, kill_rank("align", 0), 0.02, "model")
    assert not run.complete("align")
    done = run.step("align", ranks=2)
    assert "resuming after update" in done.stdout and not writing.exists()
    assert_same_curve(run.curve("align"), finished.curve("align"), 1e-5)
    assert_same_weights(run.path / "align" / "model", finished.path / "align" / "model", 1e-6)


@pytest.mark.deepspeed
def test_a_signal_makes_training_checkpoint_and_stop(copy_of: Callable[..., Run], finished: Run) -> None:
    """However the signal comes, the update at work is checkpointed, all processes end, and the run goes on there.

    The curve and model are those of an undisturbed run.
    """
    run = copy_of("sft", *LATER["sft"])
    metrics = run.path / "sft" / "metrics.jsonl"
    targets: list[tuple[signal.Signals, Callable[[Command], list[psutil.Process]]]] = [
        (signal.SIGTERM, Command.all),
        (signal.SIGTERM, lambda command: command.all("bin/deepspeed")),
        (signal.SIGUSR1, lambda command: command.ranks("sft")[1:]),
    ]
    every = "train.checkpoint_every=1000"
    for number, victims in targets:
        before = newest(run, "sft")
        command = run.start("sft", every, ranks=2)
        enough = lambda least=before + 10: updates_in(metrics) >= least  # noqa: E731
        until(enough, LIMIT_SECONDS, command.output, command.end)
        for process in victims(command):
            process.send_signal(number)
        done = command.wait()
        assert done.returncode != 0 and not run.complete("sft")
        assert before == 0 or f"resuming after update {before} " in done.stdout
        assert newest(run, "sft") >= before + 10
    before = newest(run, "sft")
    assert f"resuming after update {before} " in run.step("sft", every, ranks=2).stdout
    assert_same_curve(run.curve("sft"), finished.curve("sft"), 1e-5)
    assert_same_weights(run.path / "sft" / "model", finished.path / "sft" / "model", 1e-6)


def updates_in(metrics: Path) -> int:
    """Return the last update that a training step has logged, 0 before the first."""
    rows = metrics.read_text("utf-8").splitlines() if metrics.exists() else []
    return max((row["step"] for row in map(json.loads, rows) if row["kind"] == "train"), default=0)


def reopen(run: Run, step: str, keep: int) -> None:
    """Make a complete training step one that was interrupted after its `keep` oldest checkpoints."""
    (run.path / step / "manifest.json").unlink()
    shutil.rmtree(run.path / step / "model")
    for checkpoint in checkpoints_of(run, step)[keep:]:
        shutil.rmtree(checkpoint)


@pytest.mark.deepspeed
def test_a_damaged_checkpoint_falls_back_to_the_one_before(copy_of: Callable[..., Run], finished: Run) -> None:
    """What one rank needs of the newest checkpoint isn't whole: it is named, and both go on from the one before."""
    run = copy_of(*LATER["align"])
    reopen(run, "align", 2)
    older, newer = checkpoints_of(run, "align")
    victim = next(newer.glob("*optim_states.pt"))
    os.truncate(victim, victim.stat().st_size // 2)
    done = run.step("align", ranks=2)
    assert f"checkpoint {newer} is passed over: {victim.name}" in done.stdout
    assert f"from {older}" in done.stdout
    assert_same_curve(run.curve("align"), finished.curve("align"), 1e-5)


@pytest.mark.deepspeed
def test_two_ranks_then_one(copy_of: Callable[..., Run], finished: Run) -> None:
    """A checkpoint of two ranks is taken up by one: the loss curve is the same to 1e-4."""
    run = copy_of(*LATER["sft"])
    reopen(run, "sft", 1)
    done = run.step("sft")
    assert "the checkpoint was made by 2 ranks and is converted for 1" in done.stdout
    assert_same_curve(run.curve("sft"), finished.curve("sft"), 1e-4)
    assert_same_weights(run.path / "sft" / "model", finished.path / "sft" / "model", 1e-3)


@pytest.mark.deepspeed
def test_one_rank_then_two(copy_of: Callable[..., Run], finished: Run) -> None:
    """A checkpoint of one rank is taken up by two: the loss curve is the same to 1e-4."""
    run = copy_of("align", *LATER["align"])
    begun = lambda: bool(checkpoints_of(run, "align"))  # noqa: E731
    interrupt(lambda: run.start("align"), run, "align", begun, Command.kill, 0.3, "model")
    done = run.step("align", ranks=2)
    assert "the checkpoint was made by 1 ranks and is converted for 2" in done.stdout
    assert_same_curve(run.curve("align"), finished.curve("align"), 1e-4)


@pytest.mark.deepspeed
def test_without_the_launcher_one_process_trains_alone(copy_of: Callable[..., Run], finished: Run) -> None:
    """`python launch/align.py` is one rank, and gives what two ranks give."""
    run = copy_of("align", *LATER["align"])
    run.step("align")
    assert_same_curve(run.curve("align"), finished.curve("align"), 1e-4)
