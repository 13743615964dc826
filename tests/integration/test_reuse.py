"""What is done once and used again: complete steps, other settings, borrowed steps, rounds, eval alone, other losses.

The recipes run in this process on a small run; launch/local.sh is a command of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from coalign.runs import encode_ahead
from integration.bad_inputs import ROOT, Outcome, World, losses, run_command

pytestmark = pytest.mark.deepspeed
STEPS = ("prepare", "paraphrase", "sft", "sample", "judge", "rank", "align", "eval")
METRICS = ("cr", "mcr", "accuracy", "rouge_l")


def borrow(*steps: str) -> str:
    """Return the setting that takes steps from the complete run."""
    return "run.inputs={" + ", ".join(f'{step} = "runs/r"' for step in steps) + "}"


def must(outcome: Outcome, code: int = 0) -> Outcome:
    """Return an outcome; fail when the exit status is another than `code`."""
    assert outcome.code == code, f"exit status {outcome.code}\n{outcome.stdout[-2000:]}\n{outcome.stderr[-3000:]}"
    return outcome


def local(*words: str) -> Outcome:
    """Run launch/local.sh on one rank in the working folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "launch" / "local.sh"), "config.toml", *words]
    return must(run_command(command, PATH=path, VIRTUAL_ENV=sys.prefix, RANKS="1"))


def read(folder: Path, name: str) -> Any:
    """Return what a JSON file of a step holds."""
    return json.loads((folder / name).read_text("utf-8"))


def rows_of(path: Path) -> list[Any]:
    """Return the rows of JSONL."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("step", "setting", "was", "now"),
    [
        ("rank", "rank.max_candidates=3", "8", "3"),
        ("sample", "sample.samples=5", "2", "5"),
        ("sft", "train.weight_decay=0.1", "0.0", "0.1"),
        ("eval", "eval.max_wordings=5", "4", "5"),
    ],
)
def test_a_changed_setting_on_a_complete_step_is_refused(
    step: str, setting: str, was: str, now: str, run: World
) -> None:
    """The error names the first setting that differs, with both values; the step stays as it was."""
    manifest = run.manifest(step)
    (error,) = must(run.run(step, setting), 2).errors
    assert f"{setting.partition('=')[0]} was {was} and is now {now}" in error
    assert run.manifest(step) == manifest


def test_a_neutral_setting_changes_nothing(run: World) -> None:
    """A complete step stays complete with another number of workers, since they cannot change its result."""
    assert "sample is complete" in must(run.run("sample", "generation.workers=1")).stdout


def test_a_missing_step_names_its_command(run: World) -> None:
    """What is missing is named together with the command that makes it, launcher and settings included."""
    run.remove("sft", "rank")
    assert "deepspeed launch/sft.py config.toml run.seed=0" in must(run.run("sample", "run.seed=0"), 2).stderr
    assert "python launch/rank.py config.toml log.level=info" in must(run.run("align", "log.level=info"), 2).stderr


def test_a_stale_input_is_refused(run: World) -> None:
    """When a step was made again with another result, those made from the old one are not used further."""
    run.remove("sample", "rank", "align", "eval")
    must(run.run("sample", "run.seed=5"))
    (error,) = must(run.run("rank"), 2).errors
    assert "runs/r/judge is stale" in error and "sample" in error
    assert not (run.run_folder / "rank" / "manifest.json").exists()


def test_an_arm_borrows_what_it_shares(run: World) -> None:
    """An arm takes complete steps from another run, makes the others in its own folder, and evaluates its model."""
    words = ("run.name=arm", borrow("prepare", "paraphrase", "sft", "sample", "judge"), "rank.pool=own")
    for step in ("rank", "align", "eval"):
        must(run.run(step, *words))
    arm = run.folder / "runs" / "arm"
    assert sorted(path.name for path in arm.iterdir()) == ["align", "eval", "rank"]
    ranked = read(arm / "rank", "manifest.json")
    assert ranked["inputs"]["judge"] == run.manifest("judge")["digest"]
    assert ranked["outputs"] != run.manifest("rank")["outputs"]
    found = [read(folder / "eval", "metrics.json")["models"] for folder in (arm, run.run_folder)]
    assert found[0]["sft"]["cr"] == found[1]["sft"]["cr"]
    assert "a borrowed step is not run again here" in must(run.run("sft", *words), 2).stderr
    printed = local(*words).stdout
    assert [line[3:] for line in printed.splitlines() if line.startswith("== ")][:-1] == ["rank", "align", "eval"]
    assert printed.count("is complete in") == 3


def test_the_step_before_encodes_many_rows(run: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training finds them and gives the same model; where that fails, the step before is complete all the same."""
    monkeypatch.setattr(encode_ahead, "MANY_ROWS", 1)
    for before, step in (("paraphrase", "sft"), ("rank", "align")):
        known = run.manifest(step)["outputs"]
        run.remove(before, step)
        assert f"rows for {step}, so that its ranks need not wait" in must(run.run(before)).stdout
        assert (run.run_folder / step / "shards" / "rows" / "tokens.json").is_file()
        assert "the rows have been encoded already" in must(run.run(step)).stdout
        assert run.manifest(step)["outputs"] == known
    run.remove("paraphrase", "sft")
    words = ("model.max_tokens=16", 'model.too_long="error"')
    printed = must(run.run("paraphrase", *words)).stdout
    assert "the rows were not encoded (exit status 2); sft will encode them itself" in printed
    (error,) = must(run.run("sft", *words), 2).errors
    assert "the context of the model is 16" in error


def test_plain_fine_tuning_makes_as_many_updates(run: World) -> None:
    """The plain arm trains on the original wordings alone, with as many updates, to another model."""
    must(run.run("sft", "run.name=plain", borrow("prepare", "paraphrase"), "sft.wordings=original"))
    mine, theirs = read(run.folder / "runs" / "plain" / "sft", "manifest.json"), run.manifest("sft")
    assert mine["counts"]["updates"] == theirs["counts"]["updates"]
    assert mine["outputs"]["model"] != theirs["outputs"]["model"]


def test_a_second_round_starts_from_the_aligned_model(run: World) -> None:
    """Round two samples with the model of round one, and its steps lie in a folder of their own."""
    first = [run.manifest(step) for step in STEPS]
    for step in STEPS[3:]:
        assert "is complete" not in must(run.run(step, "run.round=2")).stdout
    second = run.run_folder / "round2"
    for step in ("sample", "align"):
        assert read(second / step, "manifest.json")["inputs"]["policy"] == run.manifest("align")["digest"]
    assert list(read(second / "eval", "metrics.json")["models"]) == ["base", "sft", "align"]
    assert [run.manifest(step) for step in STEPS] == first and "run.round" not in json.dumps(first[-1]["config"])
    printed = local("run.round=2").stdout
    for step in STEPS:
        folder = second if step in STEPS[3:] else run.run_folder
        assert f"{step} is complete in {(folder / step).relative_to(run.folder)}" in printed


def test_eval_stands_alone(run: World) -> None:
    """Any model folders are compared on the held-out inputs under the wordings of a file, written where one asks."""
    tasks = [row["id"] for row in rows_of(run.run_folder / "prepare" / "tasks.jsonl")]
    texts = ("Do {}.", "Please do {} now.", "Now do {} for me.", "I want you to do {}.")
    rows = [{"task": task, "id": f"{task}-{i}", "text": t.format(task)} for task in tasks for i, t in enumerate(texts)]
    run.write("own.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    folders = [f"runs/r/{step}/model" for step in ("sft", "align")]
    settings = [f"eval.models={json.dumps(folders)}", "eval.wordings_file=own.jsonl", "eval.folder=out"]
    before, out = run.manifest("eval"), run.folder / "out"
    must(run.run("eval", *settings))
    models = read(out, "metrics.json")["models"]
    assert list(models) == ["sft", "align"]
    assert all(model[metric]["mean"] is not None for model in models.values() for metric in METRICS)
    assert (out / "report.html").exists()
    assert {row["wording"] for row in rows_of(out / "answers.jsonl")} == {row["id"] for row in rows}
    assert run.manifest("eval") == before
    assert "eval is complete" in must(run.run("eval", *settings)).stdout


def test_results_never_overwrite_somebody_elses_config(run: World) -> None:
    """A model folder given as eval.folder is refused: its config.json is not ours, and it stays as it was."""
    model = run.run_folder / "sft" / "model"
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    error = must(run.run("eval", "eval.folder=runs/r/sft/model"), 2).stderr
    assert "runs/r/sft/model/config.json was not written by coalign" in error
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_the_logistic_loss_trains_another_model(run: World) -> None:
    """It lowers its loss, and its model is another one than the hinge's."""
    shared = borrow("prepare", "paraphrase", "sft", "sample", "judge", "rank")
    must(run.run("align", "run.name=logistic", shared, "align.loss=logistic", "align.max_steps=20"))
    folder = run.folder / "runs" / "logistic" / "align"
    found = losses(folder)
    assert len(found) == 20 and sum(found[-5:]) < sum(found[:5])
    assert not (folder / "reference.jsonl").exists()
    assert read(folder, "manifest.json")["outputs"]["model"] != run.manifest("align")["outputs"]["model"]


IN_TURN = """
import runpy, sys
for name in ("torch", "transformers", "ray", "deepspeed", "datasets"):
    sys.modules[name] = None  # which cannot be imported
launch, words = sys.argv[1], sys.argv[3:]
for step in sys.argv[2].split(","):
    sys.argv = [f"{launch}/{step}.py", *words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    print(f"{step} left with {code}", flush=True)
"""


def without_an_engine(steps: tuple[str, ...], *words: str) -> Outcome:
    """Run recipes one after another in a process that can import no engine."""
    return must(run_command([sys.executable, "-c", IN_TURN, str(ROOT / "launch"), ",".join(steps), *words]))


def test_complete_steps_need_no_engine(run: World) -> None:
    """Every step says that it is complete before anything is imported that takes seconds."""
    printed = without_an_engine(STEPS, "config.toml").stdout
    for step in STEPS:
        assert f"{step} is complete in" in printed and f"{step} left with 0\n" in printed


def test_help_and_mistakes_need_no_engine() -> None:
    """--help prints the step's keys; a misspelt key is answered with the right one."""
    printed = without_an_engine((*STEPS, "report"), "--help").stdout
    for step in (*STEPS, "report"):
        assert f"{step} left with 0\n" in printed
    for step in STEPS:
        shown = printed.partition(f"usage: python launch/{step}.py [CONFIG.toml] [key=value ...]")[2]
        keys = shown.partition(f"{step} left with")[0]
        assert "run.name" in keys and (f"[{step}]" in keys or step == "prepare")
    wrong = without_an_engine(STEPS, "run.nmae=x")
    assert [line for line in wrong.stdout.splitlines() if line] == [f"{step} left with 2" for step in STEPS]
    errors = [line for line in wrong.errors if "unknown key 'run.nmae'" in line and "did you mean 'name'" in line]
    assert len(errors) == len(wrong.errors) == len(STEPS)
