"""The same commands with other settings: adapters, ZeRO 3, other losses, no gold answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import STEPS, Run, assert_same_curve

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed, pytest.mark.timeout(600)]


def borrow(run: Run, *steps: str) -> str:
    """Return the setting that takes steps from another run."""
    return "run.inputs={" + ", ".join(f'{step} = "{run.path}"' for step in steps) + "}"


def check_run(run: Run, steps: tuple[str, ...]) -> None:
    """Fail unless the steps are complete, the models load and all numbers are there."""
    from transformers import AutoModelForCausalLM

    for step in steps:
        assert run.complete(step), step
    for step in {"sft", "align"} & set(steps):
        model = AutoModelForCausalLM.from_pretrained(run.path / step / "model")
        assert not [name for name in model.state_dict() if "lora" in name]
    result = json.loads((run.path / "eval" / "metrics.json").read_text("utf-8"))
    assert all(model["cr"]["mean"] is not None for model in result["models"].values())


@pytest.mark.parametrize(
    "settings",
    [
        ["model.lora.enabled=true", "model.lora.rank=8", "sft.learning_rate=1e-2"],
        ["train.zero_stage=3", "model.lora.enabled=true"],
    ],
    ids=["lora", "zero3-lora"],
)
def test_the_pipeline_with_other_training_settings(settings: list[str], finished: Run, tmp_path: Path) -> None:
    """All steps from sft to eval work, the loss falls, and the exported models load as plain ones."""
    run = Run(tmp_path / "variant")
    run.all_steps(borrow(finished, "prepare", "paraphrase"), "generation.workers=0", *settings)
    check_run(run, STEPS[2:])
    losses = list(run.curve("sft").values())
    assert losses[-1] < losses[0] - 0.2  # adapters on untrained weights can learn little


def test_zero_3_trains_as_zero_2_does(finished: Run, tmp_path: Path) -> None:
    """The loss curve does not depend on how the states are sharded."""
    run = Run(tmp_path / "zero3")
    shared = ("prepare", "paraphrase", "sft", "sample", "judge", "rank")
    run.step("align", borrow(finished, *shared), "train.zero_stage=3", ranks=2)
    assert_same_curve(run.curve("align"), finished.curve("align"), 1e-4)


@pytest.mark.parametrize("loss", ["logistic", "dpo"])
def test_align_with_another_loss(loss: str, finished: Run, tmp_path: Path) -> None:
    """The other ranking losses train a model of their own and lower their loss."""
    run = Run(tmp_path / loss)
    shared = ("prepare", "paraphrase", "sft", "sample", "judge", "rank")
    run.step("align", borrow(finished, *shared), f"align.loss={loss}", "align.rank_weight=2.0", ranks=2)
    assert (run.path / "align" / "reference.jsonl").exists() == (loss == "dpo")
    assert run.manifest("align")["outputs"]["model"] != finished.manifest("align")["outputs"]["model"]
    losses = list(run.curve("align").values())
    assert sum(losses[-10:]) < sum(losses[:10])


def test_the_pipeline_without_gold_answers(finished: Run, tmp_path: Path) -> None:
    """With judge.gold=false no gold answer gets into a group, and everything up to eval works."""
    run = Run(tmp_path / "unlabelled")
    shared = ("prepare", "paraphrase", "sft", "sample")
    # An untrained model's answers agree over no two wordings.
    run.all_steps(borrow(finished, *shared), "judge.gold=false", "rank.min_agreement=0", "generation.workers=0")
    check_run(run, ("judge", "rank", "align", "eval"))
    responses = {
        (row["example"], row["text"])
        for row in map(json.loads, (finished.path / "sample/responses.jsonl").read_text("utf-8").splitlines())
    }
    for line in (run.path / "rank/groups.jsonl").read_text("utf-8").splitlines():
        group = json.loads(line)
        assert all((group["example"], c["text"]) in responses for c in group["candidates"])
