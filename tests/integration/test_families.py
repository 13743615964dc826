"""Models of several families through the real recipes: trained and exported, or refused before the first update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from integration.bad_inputs import Outcome, World, losses
from numerics.families import make_tiny


def make_family(world: World, family: str) -> tuple[str, ...]:
    """Write ./my-model, a tiny model of the family, and return the settings that train it."""
    make_tiny(family, world.folder / "my-model")
    return ("model.init=pretrained", "model.path=./my-model")


def run_steps(world: World, steps: str, *settings: str) -> Outcome:
    """Run recipes one after another; return the first outcome that is no success, or the last."""
    for step in steps.split():
        outcome = world.run(step, *settings)
        if outcome.code:
            break
    return outcome


def opened(folder: Path) -> dict[str, Any]:
    """Return the weights of a folder as a user opens it."""
    weights: dict[str, Any] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return weights


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3_moe", ()), ("qwen3_moe", ("model.lora.enabled=true",)), ("gpt_neox", ("model.lora.enabled=true",))],
)
def test_a_model_whose_file_has_other_names_is_exported(world: World, family: str, settings: tuple[str, ...]) -> None:
    """Weights are saved under the names of the hub, and experts one by one; a user finds the trained ones in them."""
    settings = (*make_family(world, family), *settings)
    outcome = run_steps(world, "prepare paraphrase sft", *settings)
    assert outcome.code == 0, outcome.stderr
    before, after = opened(world.folder / "my-model"), opened(world.run_folder / "sft" / "model")
    assert before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("attention" in name or "self_attn" in name for name in changed)
    assert losses(world.run_folder / "sft") and not (world.run_folder / "sft" / "shards").exists()


def test_a_model_that_cannot_be_exported_is_not_trained(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The untouched model is exported before the first update; what goes wrong there ends the step in one line."""
    settings = make_family(world, "llama")
    assert run_steps(world, "prepare paraphrase", *settings).code == 0

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no reverse of Chunk\nof three lines\n")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    outcome = world.run("sft", *settings)
    assert outcome.code == 2
    (line,) = outcome.errors
    assert line.startswith("error: ./my-model: ") and "no reverse of Chunk; use another model" in line
    assert not (world.run_folder / "sft" / "metrics.jsonl").exists() and not world.half_written()
    monkeypatch.undo()
    monkeypatch.chdir(world.folder)
    assert world.run("sft", *settings).code == 0


def test_the_untouched_model_is_exported_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that resumes from a checkpoint has tried it already."""
    from coalign.training import export

    tried: list[str] = []
    real = export.export_model

    def watch(folder: Path, *rest: Any) -> None:
        tried.append(folder.name)
        real(folder, *rest)

    monkeypatch.setattr(export, "export_model", watch)
    settings = (*make_family(world, "llama"), "train.checkpoint_every=2", "log.every=1")
    assert run_steps(world, "prepare paraphrase sft", *settings).code == 0
    assert tried == ["untrained", "model"]
    (world.run_folder / "sft" / "manifest.json").unlink()
    assert world.run("sft", *settings).code == 0
    assert tried == ["untrained", "model", "model"]
