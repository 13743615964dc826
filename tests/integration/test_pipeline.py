"""The whole pipeline through the real commands: what it leaves, what a second run does, and trouble in the middle."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import STEPS, Clusters, Run, assert_same_files, until
from huggingface_hub import ModelCard

from coalign.config import ModelTable
from coalign.models.model_folder import load_codec
from coalign.runs.digests import digest_folder

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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    codec = load_codec(str(folder), ModelTable())
    assert json.loads(done.stdout.splitlines()[-1]) == codec.encode_prompt("the instruction\n\nthe input")


def test_training_lowers_the_loss(finished: Run) -> None:
    """Both stages end with a lower loss than they began with."""
    for step in ("sft", "align"):
        losses = list(finished.curve(step).values())
        assert sum(losses[-10:]) < 0.95 * sum(losses[:10]), step


def test_a_second_run_does_nothing_and_says_so(finished: Run) -> None:
    """Each of the eight steps says that it is complete, no file is written again, and Ray is not started for it."""

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")}

    before, clusters = times(), Clusters()
    command = finished.start_all()
    clusters.watch(command)
    done = command.wait()
    assert done.returncode == 0, done.stderr
    for step in STEPS:
        assert f"{step} is complete in" in done.stdout, step
    assert times() == before
    assert not clusters.heads


def test_two_commands_on_one_step_do_not_mix(copy_of: Callable[..., Run], finished: Run) -> None:
    """The second command stops with exit status 2 and names the first one's process, which goes on undisturbed."""
    run = copy_of("sample", "judge", "rank", "align", "eval")
    first = run.start("sample", "generation.workers=0")
    until(lambda: any((run.path / "sample" / "shards").glob("*.jsonl")), 240, first.output, first.end)
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
    until(lambda: any((run.path / "sample" / "shards").glob("*.jsonl")), 240, command.output, command.end)
    victim = command.actors()[0]
    victim.kill()
    assert not run.complete("sample"), "the actor must die while there is work left"
    done = command.wait()
    assert done.returncode == 0, done.stderr
    assert_same_files(run.path / "sample", finished.path / "sample", ["responses.jsonl", "dropped.jsonl"])
