"""Training through the real command with other settings: adapters, ZeRO 3, a reference model; all without gold answers.

What comes after training knows nothing of how it was done; test_reuse.py has another loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import CONFIG, ROOT, Run, assert_same_curve

from integration.bad_inputs import run_recipe

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed, pytest.mark.timeout(900)]
SHARED = {
    "sft": ("prepare", "paraphrase"),
    "align": ("prepare", "paraphrase", "sft", "sample", "judge", "rank"),
}


def fall_of(curve: dict[int, float]) -> float:
    """Return by how much the second half of a loss curve lies below the first: batches differ, halves hardly."""
    losses = list(curve.values())
    half = len(losses) // 2
    return sum(losses[:half]) / half - sum(losses[-half:]) / half


def train(step: str, finished: Run, folder: Path, *settings: str) -> Run:
    """Run a training step on two ranks with what another run has made before it."""
    run = Run(folder / "variant")
    borrowed = "run.inputs={" + ", ".join(f'{name} = "{finished.path}"' for name in SHARED[step]) + "}"
    run.step(step, borrowed, *settings, ranks=2)
    return run


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        ("sft", ["model.lora.enabled=true", "model.lora.rank=8", "sft.learning_rate=1e-2"]),
        ("align", ["train.zero_stage=3", "model.lora.enabled=true"]),
    ],
    ids=["lora", "zero3-lora"],
)
def test_adapters_train_and_leave_a_plain_model(step: str, settings: list[str], finished: Run, tmp_path: Path) -> None:
    """The loss falls, and the exported model is another one and loads as a plain one."""
    from transformers import AutoModelForCausalLM

    run = train(step, finished, tmp_path, *settings)
    curve = run.curve(step)
    # Adapters on untrained weights learn little, and at once; align starts from trained ones, and its batches differ.
    assert curve[len(curve)] < curve[1] - 0.2 if step == "sft" else fall_of(curve) > 0.1
    model = AutoModelForCausalLM.from_pretrained(run.path / step / "model")
    assert not [name for name in model.state_dict() if "lora" in name]
    assert run.manifest(step)["outputs"]["model"] != finished.manifest(step)["outputs"]["model"]


def test_zero_3_trains_as_zero_2_does(finished: Run, tmp_path: Path) -> None:
    """The loss curve does not depend on how the states are sharded."""
    run = train("align", finished, tmp_path, "train.zero_stage=3")
    assert_same_curve(run.curve("align"), finished.curve("align"), 1e-4)


def test_align_with_a_reference(finished: Run, tmp_path: Path) -> None:
    """DPO's form keeps what the reference says, trains a model of its own and lowers its loss."""
    run = train("align", finished, tmp_path, "align.loss=dpo", "align.rank_weight=2.0")
    assert (run.path / "align" / "reference.jsonl").exists()
    assert run.manifest("align")["outputs"]["model"] != finished.manifest("align")["outputs"]["model"]
    assert fall_of(run.curve("align")) > 0.1


@pytest.mark.usefixtures("_one_rank")
def test_no_gold_answer_gets_into_a_group_without_gold(
    copy_of: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With judge.gold=false every candidate was sampled, and everything up to eval works, here in this process."""
    monkeypatch.chdir(ROOT)
    run = copy_of("judge", "rank", "align", "eval")
    # An untrained model's answers agree over no two wordings.
    settings = ("judge.gold=false", "rank.min_agreement=0", "align.max_steps=10", "eval.noise_inputs=0")
    for step in ("judge", "rank", "align", "eval"):
        outcome = run_recipe(step, str(CONFIG), *run.place, "generation.workers=0", *settings)
        assert outcome.code == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]

    def rows_of(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run.path / name).read_text("utf-8").splitlines()]

    sampled = {(row["example"], row["text"]) for row in rows_of("sample/responses.jsonl")}
    groups = rows_of("rank/groups.jsonl")
    assert groups and all((g["example"], c["text"]) in sampled for g in groups for c in g["candidates"])
    result = json.loads((run.path / "eval" / "metrics.json").read_text("utf-8"))
    assert all(model["cr"]["mean"] is not None for model in result["models"].values())
