"""What launch/local.sh and launch/ladder.sh ask before they start: the steps of a run, and the workers they need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from integration.bad_inputs import Outcome, run_recipe

WORDS = ("model.init=random", "model.path=", "generation.workers=3")
STEPS = ["prepare", "paraphrase", "sft", "sample", "judge", "rank", "align", "eval"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


WHOLE: dict[str, object] = {"config": {}, "inputs": {}, "outputs": {}, "counts": {}, "digest": "d"}


def complete(*folders: str) -> None:
    """Make steps of a run look complete."""
    for folder in folders:
        Path(folder).mkdir(parents=True)
        Path(folder, "manifest.json").write_text(json.dumps(WHOLE))


def ask(script: str, *words: str) -> Outcome:
    """Return what launch/remaining.py answers."""
    return run_recipe("remaining", script, *WORDS, *words)


def test_a_new_run_has_all_steps_and_needs_its_workers() -> None:
    assert ask("local").stdout.splitlines() == [" ".join(STEPS), "3"]


def test_borrowed_steps_are_not_the_runs_own() -> None:
    steps, workers = ask("local", 'run.inputs={prepare = "runs/a", sft = "runs/a"}').stdout.splitlines()
    assert steps.split() == [step for step in STEPS if step not in ("prepare", "sft")] and workers == "3"


def test_no_workers_where_no_step_is_left_that_asks_a_model() -> None:
    complete(*(f"runs/default/{step}" for step in ("paraphrase", "sample", "judge")))
    assert ask("local").stdout.splitlines()[1] == "3"
    complete("elsewhere")
    assert ask("local", "eval.folder=elsewhere").stdout.splitlines()[1] == "0"


def test_paraphrase_without_rewrites_needs_none() -> None:
    complete(*(f"runs/default/{step}" for step in ("sample", "judge", "eval")))
    assert ask("local").stdout.splitlines()[1] == "3"
    assert ask("local", "paraphrase.num_wordings=0").stdout.splitlines()[1] == "0"


@pytest.mark.parametrize("script", ["local", "ladder"])
def test_another_cluster_takes_the_place_of_a_private_one(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(script).stdout.splitlines()[-1] == "3"
    assert ask(script, "generation.ray_address=10.0.0.1:6379").stdout.splitlines()[-1] == "0"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert ask(script).stdout.splitlines()[-1] == "0"


def test_a_ladder_that_starts_nothing_needs_no_workers() -> None:
    for words in (("--dry-run",), ("--help",), ("--arms", "none"), ("run.nothing=1",)):
        outcome = ask("ladder", *words)
        assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "0\n", ""), words


def test_invalid_settings_of_a_pipeline_are_reported_before_anything_starts() -> None:
    outcome = ask("local", "sft.batchrows=4")
    assert outcome.code == 2 and not outcome.stdout
    assert outcome.errors == [line for line in outcome.errors if "did you mean 'batch_rows'?" in line] != []


def test_help_and_other_scripts() -> None:
    assert "python launch/remaining.py local" in run_recipe("remaining", "--help").stdout
    for words in ((), ("pipeline",)):
        outcome = run_recipe("remaining", *words)
        assert outcome.code == 2 and len(outcome.errors) == 1
