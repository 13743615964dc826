"""The whole pipeline through the real commands: what it leaves, what a second run does, arms, rounds, eval alone."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, STEPS, Run, assert_same_files, until
from huggingface_hub import ModelCard

from coalign.artifacts import digest_folder
from coalign.config import ModelTable
from coalign.encoding import Codec
from coalign.models import load_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.timeout(900)]
METRICS = ("cr", "mcr", "accuracy", "rouge_l")


def test_the_pipeline_leaves_what_it_promises(finished: Run) -> None:
    """Eight manifests, two models that transformers loads, metrics with intervals for three models, and a report."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    counts = {step: finished.manifest(step)["counts"] for step in STEPS}
    assert counts["sample"]["responses"] >= 500
    assert counts["align"]["updates"] == 60
    assert counts["sft"]["ranks"] == counts["align"]["ranks"] == 2
    for step in ("sft", "align"):
        folder = finished.path / step / "model"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "ice"}], return_tensors="pt")
        assert math.isfinite(model(prompt["input_ids"]).logits.sum().item())
        assert not list((finished.path / step).glob(".*.tmp"))
    result = json.loads((finished.path / "eval" / "metrics.json").read_text("utf-8"))
    assert list(result["models"]) == ["base", "sft", "align"]
    for model in result["models"].values():
        for metric in METRICS:
            assert {"mean", "low", "high"} <= model[metric].keys()
            assert 0 <= model[metric]["mean"] <= 1
    differences = {(row["a"], row["b"], row["metric"]): row for row in result["differences"]}
    for metric in METRICS:
        row = differences["base", "align", metric]
        assert {"mean", "low", "high"} <= row.keys()
        expected = result["models"]["align"][metric]["mean"] - result["models"]["base"][metric]["mean"]
        assert row["mean"] == pytest.approx(expected)
    page = (finished.path / "eval" / "report.html").read_text("utf-8")
    assert "align" in page and "</html>" in page
    assert "deepspeed --num_gpus 2 launch/sft.py run.toml" in page


def test_model_cards_hold_the_results_and_their_code_runs(finished: Run) -> None:
    """Eval's numbers stand in the Hub's metadata, the shown code answers as written, digests are still right."""
    result = json.loads((finished.path / "eval" / "metrics.json").read_text("utf-8"))
    for step in ("sft", "align"):
        folder = finished.path / step / "model"
        card = ModelCard.load(folder / "README.md")
        found = {one.metric_type: one.metric_value for one in card.data.eval_results}
        assert found["cr"] == pytest.approx(result["models"][step]["cr"]["mean"], abs=1e-4)
        assert "Not yet evaluated" not in card.text and str(finished.path.parent) not in card.content
        assert digest_folder(folder) == finished.manifest(step)["outputs"]["model"]
    assert not (finished.path / "prepare" / "model" / "README.md").exists()
    code = card.text.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(folder))
    code += "\nprint(prompt['input_ids'][0].tolist())\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    codec = Codec(load_tokenizer(str(folder), ModelTable()), ModelTable())
    assert json.loads(done.stdout.splitlines()[-1]) == codec.encode_prompt("the instruction\n\nthe input")


def test_training_lowers_the_loss(finished: Run) -> None:
    """Both stages end with a lower loss than they began with."""
    for step in ("sft", "align"):
        losses = list(finished.curve(step).values())
        assert sum(losses[-10:]) < 0.95 * sum(losses[:10]), step


def test_a_second_run_does_nothing_and_says_so(finished: Run) -> None:
    """Each of the eight steps says that it is complete, and no file is written again."""

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")}

    before = times()
    done = finished.all_steps()
    for step in STEPS:
        assert f"{step} is complete in" in done.stdout, step
    assert times() == before


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
    finished: Run, step: str, setting: str, was: str, now: str
) -> None:
    """The error names the first setting that differs, with both values; the step stays as it was."""
    manifest = finished.manifest(step)
    error = finished.step(step, setting, code=2).stderr
    assert f"{setting.partition('=')[0]} was {was} and is now {now}" in error
    assert "Traceback" not in error
    assert finished.manifest(step) == manifest


def test_a_neutral_setting_changes_nothing(finished: Run) -> None:
    """A complete step stays complete with another number of workers, since they cannot change its result."""
    assert "sample is complete" in finished.step("sample", "generation.workers=1").stdout


def test_a_missing_step_names_its_command(copy_of: Callable[..., Run]) -> None:
    """What is missing is named together with the command that makes it, launcher and settings included."""
    run = copy_of("sft", "rank")
    assert "deepspeed launch/sft.py tests/integration/tiny.toml" in run.step("sample", code=2).stderr
    expected = f"python launch/rank.py tests/integration/tiny.toml run.folder={run.path.parent}"
    assert expected in run.step("align", code=2).stderr


def test_a_stale_input_is_refused(copy_of: Callable[..., Run]) -> None:
    """When a step was made again with another result, those made from the old one are not used further."""
    run = copy_of("rank", "align", "eval")
    for path in (run.path / "sample").iterdir():
        path.unlink()
    (run.path / "sample").rmdir()
    run.step("sample", "generation.workers=0", "run.seed=5")
    error = run.step("rank", code=2).stderr
    assert f"{run.path / 'judge'} is stale" in error and "sample" in error
    assert not run.complete("rank")


def test_two_commands_on_one_step_do_not_mix(copy_of: Callable[..., Run], finished: Run) -> None:
    """The second command stops with exit code 2 and names the first one's process, which goes on undisturbed."""
    run = copy_of("sample", "judge", "rank", "align", "eval")
    first = run.start("sample", "generation.workers=0")
    until(lambda: any((run.path / "sample" / "shards").glob("*.jsonl")), 60, first.output, first.end)
    first.kill(signal.SIGSTOP)  # else it might be done before the second one gives up
    assert not run.complete("sample")
    error = run.step("sample", "generation.workers=0", code=2).stderr
    assert f"process {first.process.pid} on" in error
    first.kill(signal.SIGCONT)
    assert first.wait().returncode == 0
    assert_same_files(run.path / "sample", finished.path / "sample", ["responses.jsonl"])


def test_a_killed_ray_actor_changes_nothing(copy_of: Callable[..., Run], finished: Run) -> None:
    """An actor killed in the middle of sampling is replaced, and the responses are those of an undisturbed run."""
    run = copy_of("sample", "judge", "rank", "align", "eval")
    command = run.start("sample")
    until(lambda: any((run.path / "sample" / "shards").glob("*.jsonl")), 90, command.output, command.end)
    victim = command.actors()[0]
    victim.kill()
    assert not run.complete("sample"), "the actor must die while there is work left"
    done = command.wait()
    assert done.returncode == 0, done.stderr
    assert_same_files(run.path / "sample", finished.path / "sample", ["responses.jsonl", "dropped.jsonl"])


def test_an_arm_borrows_what_it_shares(finished: Run, tmp_path: Path) -> None:
    """An arm takes complete steps from another run, makes the others in its own folder, and evaluates its model."""
    arm = Run(tmp_path / "permuted")
    shared = ("prepare", "paraphrase", "sft", "sample", "judge")
    inputs = ", ".join(f'{step} = "{finished.path}"' for step in shared)
    done = arm.all_steps(f"run.inputs={{{inputs}}}", "rank.rewards=permuted", "generation.workers=0", ranks=1)
    assert sorted(path.name for path in arm.path.iterdir()) == ["align", "eval", "rank"]
    assert [line[3:] for line in done.stdout.splitlines() if line.startswith("== ")][:3] == ["rank", "align", "eval"]
    assert arm.manifest("rank")["inputs"]["judge"] == finished.manifest("judge")["digest"]
    assert arm.manifest("rank")["outputs"] != finished.manifest("rank")["outputs"]
    found = [json.loads((run.path / "eval/metrics.json").read_text("utf-8"))["models"] for run in (arm, finished)]
    assert found[0]["sft"]["cr"] == found[1]["sft"]["cr"]
    error = arm.step("sft", f"run.inputs={{{inputs}}}", code=2).stderr
    assert "a borrowed step is not run again here" in error


def test_plain_fine_tuning_makes_as_many_updates(finished: Run, tmp_path: Path) -> None:
    """The plain arm trains on the original wordings alone, with as many updates, to another model."""
    arm = Run(tmp_path / "plain")
    inputs = f'run.inputs={{prepare = "{finished.path}", paraphrase = "{finished.path}"}}'
    arm.step("sft", inputs, "sft.wordings=original")
    mine, theirs = arm.manifest("sft"), finished.manifest("sft")
    assert mine["counts"]["updates"] == theirs["counts"]["updates"]
    assert mine["outputs"]["model"] != theirs["outputs"]["model"]


def test_a_second_round_starts_from_the_aligned_model(copy_of: Callable[..., Run], finished: Run) -> None:
    """Round two samples with the model of round one, and its steps lie in a folder of their own."""
    run = copy_of()
    done = run.all_steps("run.round=2", "generation.workers=0", ranks=1)
    assert "sft is complete" in done.stdout and "sample is complete" not in done.stdout
    second = Run(run.path / "round2")
    assert second.manifest("sample")["inputs"]["policy"] == finished.manifest("align")["digest"]
    assert second.manifest("align")["inputs"]["policy"] == finished.manifest("align")["digest"]
    result = json.loads((second.path / "eval/metrics.json").read_text("utf-8"))
    assert list(result["models"]) == ["base", "sft", "align"]
    assert "run.round" not in json.dumps(run.manifest("eval")["config"])


def test_eval_stands_alone(finished: Run, tmp_path: Path) -> None:
    """Any model folders are compared on the held-out inputs under the wordings of a file, written where one asks."""
    tasks = [json.loads(line)["id"] for line in (finished.path / "prepare/tasks.jsonl").read_text("utf-8").splitlines()]
    texts = ("Do {}.", "Please do {} now.", "Now do {} for me.", "I want you to do {}.")
    rows = [{"task": task, "id": f"{task}-{i}", "text": t.format(task)} for task in tasks for i, t in enumerate(texts)]
    (tmp_path / "wordings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    folders = [str(finished.path / step / "model") for step in ("sft", "align")]
    out = tmp_path / "out"
    settings = [f"eval.models={json.dumps(folders)}", f"eval.wordings_file={tmp_path / 'wordings.jsonl'}"]
    settings += [f"eval.folder={out}", "generation.workers=0"]
    before = finished.manifest("eval")
    finished.step("eval", *settings)
    result = json.loads((out / "metrics.json").read_text("utf-8"))
    assert list(result["models"]) == ["sft", "align"]
    assert all(model[metric]["mean"] is not None for model in result["models"].values() for metric in METRICS)
    assert (out / "report.html").exists()
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text("utf-8").splitlines()]
    assert {row["wording"] for row in answers} == {row["id"] for row in rows}
    assert finished.manifest("eval") == before
    assert "eval is complete" in finished.step("eval", *settings).stdout


def test_results_never_overwrite_somebody_elses_config(copy_of: Callable[..., Run]) -> None:
    """A model folder given as eval.folder is refused: its config.json is not ours, and it stays as it was."""
    run = copy_of()
    model = run.path / "sft" / "model"
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    error = run.step("eval", f"eval.folder={model}", code=2).stderr
    assert f"{model / 'config.json'} was not written by coalign" in error
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.parametrize("step", STEPS)
def test_help_and_mistakes_answer_without_an_engine(step: str) -> None:
    """--help prints the step's keys; a misspelt key is answered with the right one, before torch is imported."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        # A module that cannot be imported stands in for torch.
        code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], "
        command = [sys.executable, "-c", code + "run_name='__main__')", f"launch/{step}.py", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)

    shown = run("--help")
    assert shown.returncode == 0, shown.stderr
    assert f"launch/{step}.py [CONFIG.toml] [key=value ...]" in shown.stdout and "run.name" in shown.stdout
    wrong = run("run.nmae=x")
    assert wrong.returncode == 2
    assert "run.nmae" in wrong.stderr and "did you mean 'name'" in wrong.stderr
