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


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("lfm2", "keeps more than keys and values of its tokens"),
        ("mamba", "keeps more than keys and values of its tokens"),
        ("rwkv", "it ignores the mask of padding"),
        ("bert", "its tokens see later ones"),
    ],
)
def test_a_model_that_cannot_be_sampled_is_not_trained(world: World, family: str, said: str) -> None:
    """Refused before the first update, in one line, and not after stage 1."""
    outcome = run_steps(world, "prepare paraphrase sft", *make_family(world, family))
    assert outcome.code == 2
    errors = [line for line in outcome.errors if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and "use a" in errors[0] and "Traceback" not in outcome.stderr
    assert not (world.run_folder / "sft" / "metrics.jsonl").exists()
    assert not (world.run_folder / "sft" / "model").exists()


def test_a_hybrid_model_is_trained_in_rows_of_its_own_for_vllm(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code rejects the mask of shared rows; stage 1 unpacks by itself, with one line, and trains as unpacked."""
    settings = make_family(world, "qwen3_next")
    assert run_steps(world, "prepare paraphrase", *settings).code == 0
    monkeypatch.setattr("coalign.models.model_checks.has_plain_cache", lambda config: True)
    monkeypatch.setattr("coalign.models.model_checks._complaint_of_cache", lambda model, pad_id: "")
    found = []
    for packed in ("train.pack_tokens=-1", "train.pack_tokens=0"):
        outcome = world.run("sft", *settings, packed)
        assert outcome.code == 0, outcome.stderr
        found.append((losses(world.run_folder / "sft"), outcome.stdout.count("items get rows of their own")))
        world.remove("sft")
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6) and [count for _, count in found] == [1, 0]


@pytest.mark.parametrize("family", ["gemma3", pytest.param("mistral3", marks=pytest.mark.slow)])
def test_the_text_part_of_a_model_for_images_is_trained(world: World, family: str) -> None:
    """The exported folder is one of text alone: a user opens it, and the next step samples from it."""
    settings = make_family(world, family)
    outcome = run_steps(world, "prepare paraphrase sft sample", *settings)
    assert outcome.code == 0, outcome.stderr
    model, report = AutoModelForCausalLM.from_pretrained(world.run_folder / "sft" / "model", output_loading_info=True)
    assert type(model).__name__ == {"gemma3": "Gemma3ForCausalLM", "mistral3": "MistralForCausalLM"}[family]
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.architectures == [type(model).__name__]
    assert not any("vision" in name for name in model.state_dict())
