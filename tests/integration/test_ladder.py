"""The experiment of arms through its real command: shared steps once, the table, going on where it stopped."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from commands import CONFIG, LIMIT_SECONDS, ROOT, start

from integration.bad_inputs import run_recipe

ARMS = ("sft_ia", "sft_ia_more", "cat", "cat_lambda0")
# Epochs, so that cat's own number of updates decides; everything as small as it can be.
SMALL = (
    *("data.max_align_inputs=8", "sft.max_steps=20", "align.max_steps=0", "align.epochs=0.5", "train.eval_every=0"),
    *("generation.workers=0", "eval.noise_inputs=0", "paraphrase.num_wordings=0"),
)


def ladder(folder: Path, *words: str, code: int = 0, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    command = ["bash", "launch/ladder.sh", str(CONFIG.relative_to(ROOT)), f"run.folder={folder}", "run.name=tiny"]
    done = start([*command, *words], folder / "printed", {"RANKS": str(ranks)}).wait(4 * LIMIT_SECONDS)
    assert done.returncode == code, f"exit status {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.timeout(1800)
def test_a_ladder_runs_shared_steps_once_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A mistake stops it with the step's name and command; the same command goes on; complete, it does nothing."""
    home = tmp_path / "tiny"
    words = ["--arms", ",".join(ARMS), "--seeds", "1", *SMALL]

    failed = ladder(tmp_path, *words, "judge.model=nowhere", code=2)
    assert (
        "seed 1, cat (arm 3 of 4), judge failed (exit status 2)" in failed.stderr and "launch/judge.py" in failed.stderr
    )
    assert "judge.model='nowhere' is not" in failed.stderr and "Traceback" not in failed.stderr
    sampled = (home / "seed1/cat/sample/manifest.json").stat().st_mtime_ns

    done = ladder(tmp_path, *words)
    assert (home / "seed1/cat/sample/manifest.json").stat().st_mtime_ns == sampled
    steps = sorted(str(path.parent.relative_to(home)) for path in home.rglob("manifest.json"))
    evals = f"eval_{'-'.join(ARMS)}"
    once = ["cat/align", "cat/judge", "cat/rank", "cat/sample", "cat_lambda0/align", evals]
    once += ["sft_ia/paraphrase", "sft_ia/sft", "sft_ia_more/sft"]
    assert steps == ["prepare", *(f"seed1/{step}" for step in once)]

    result = json.loads((home / "ladder/metrics.json").read_text("utf-8"))
    assert list(result["arms"]) == list(ARMS) and result["seeds"] == [1]
    of_seed = json.loads((home / f"seed1/{evals}/metrics.json").read_text("utf-8"))
    for name in ARMS:
        for metric, found in result["arms"][name]["metrics"]["all"].items():
            assert found["seeds"] == pytest.approx([of_seed["models"][name][metric]["mean"]])
            assert found["mean"] == pytest.approx(found["seeds"][0])
    updates = {name: arm["cost"]["updates"] for name, arm in result["arms"].items()}
    assert updates["sft_ia"] == [20] and updates["cat"] == updates["cat_lambda0"] == updates["sft_ia_more"]
    assert updates["cat"][1] > 1
    compared = {(row["b"], row["a"]) for row in result["differences"]["all"]}
    assert compared == {("cat", "sft_ia"), ("cat", "sft_ia_more"), ("cat", "cat_lambda0")}
    table = (home / "ladder/table.md").read_text("utf-8")
    assert table.strip() in done.stdout
    assert all(f"\n| {name}: " in table for name in ARMS)
    assert (home / "ladder/figure.svg").exists() and (home / "ladder/figure.png").exists()

    card = (home / "seed1/cat/align/model/README.md").read_text("utf-8")
    assert "model-index" in card and "(this model)" in card

    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if "ladder" not in path.parts[-2:]}
    again = ladder(tmp_path, *words)
    assert [line.partition(" (")[0] for line in again.stdout.splitlines() if line.startswith("== ")] == [
        "== step 1 of 10: all seeds, all arms, prepare",
        "== step 2 of 10: seed 1, sft_ia",
    ]
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*") if "ladder" not in path.parts[-2:]} == before
    changed = ladder(tmp_path, *words, "align.margin=0.25", code=2)
    assert "align.margin was 0.5 and is now 0.25" in changed.stderr


def test_a_dry_run_starts_nothing_and_mistakes_answer_at_once(tmp_path: Path) -> None:
    done = ladder(tmp_path, "--dry-run", "--seeds", "0", ranks=2)
    commands = [line for line in done.stdout.splitlines() if "launch/" in line]
    assert len(commands) == 29 and sum("launch/prepare.py" in line for line in commands) == 1
    assert sum("deepspeed.launcher.runner --num_gpus 2" in line for line in commands) == 12
    assert not (tmp_path / "tiny").exists()
    assert "'cats' is no arm; choose among base, sft" in ladder(tmp_path, "--arms", "cats", code=2).stderr
    mistakes = {"rank.pool=own": "rank.pool", "run.nmae=x": "did you mean 'name'"}
    for word, said in mistakes.items():
        outcome = run_recipe("ladder", str(CONFIG), word)
        assert outcome.code == 2 and said in outcome.stderr
    assert "--dry-run" in run_recipe("ladder", "--help").stdout
