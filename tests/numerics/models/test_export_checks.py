"""export_checks: weights compared name by name, merged adapters against what training changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from coalign.config import LoraTable, ModelTable
from coalign.models import lora
from coalign.models.export_checks import complaint_of_merge, complaint_of_reopened, main_dtype
from coalign.models.lora import attach_lora, merge_lora
from coalign.models.model_folder import load_model
from numerics.families import make_tiny


def test_the_main_dtype_is_that_of_most_weights() -> None:
    state = {
        "steps": torch.zeros(1000, dtype=torch.long),
        "scale": torch.zeros(3, dtype=torch.float32),
        "weight": torch.zeros(4, 4, dtype=torch.bfloat16),
    }
    assert main_dtype(state) is torch.bfloat16


@pytest.mark.parametrize(
    ("reopened", "said"),
    [
        ({"a": torch.ones(2)}, None),
        ({"a": torch.ones(2).double()}, None),
        ({"a": torch.zeros(2)}, "a was reopened with other values"),
        ({"a": torch.ones(3)}, "a was reopened with other values"),
        ({"b": torch.ones(2)}, "reopened with other keys (first missing: ['a'])"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, "reopened with other keys (first missing: ['b'])"),
    ],
)
def test_weights_are_compared_by_name(reopened: dict[str, Tensor], said: str | None) -> None:
    assert complaint_of_reopened(reopened, {"a": torch.ones(2)}) == said


def test_the_tolerance_of_a_merge_follows_from_the_change() -> None:
    """What is rounding beside a large change is a wrong merge beside a small one."""
    untouched_N = torch.zeros(100)
    for change, error, right in [(1.0, 5e-3, True), (1.0, 0.1, False), (7e-3, 5e-3, False), (7e-3, 5e-5, True)]:
        trained_N = untouched_N + change
        assert (complaint_of_merge(trained_N + error, trained_N, untouched_N) is None) == right


def test_a_wrong_merge_is_seen_in_narrow_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a merge is compared in float32: adapters merged into a weight too many fail, and are named."""
    table = ModelTable(lora=LoraTable(enabled=True, rank=4, alpha=8.0, target_modules=["q_proj", "v_proj"]))
    source = str(tmp_path / "model")
    make_tiny("llama", tmp_path / "model")
    model = attach_lora(load_model(source, table, torch.float32), table.lora)
    torch.manual_seed(2)
    adapters = {
        name: torch.randn(tensor.shape).mul_(0.02).bfloat16()
        for name, tensor in model.state_dict().items()
        if ".lora_" in name
    }
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])

    def measure(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids).logits
        return logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)

    right = merge_lora(source, table, adapters, measure)
    assert all(torch.equal(tensor, right[name]) for name, tensor in merge_lora(source, table, adapters).items())
    attach = lora._adapt

    def attach_and_spoil(*args: object) -> torch.nn.Module:
        network: torch.nn.Module = attach(*args)
        merge = network.merge_and_unload

        def merge_too_much(**options: bool) -> torch.nn.Module:
            merged: torch.nn.Module = merge(**options)
            with torch.no_grad():
                merged.model.layers[0].self_attn.o_proj.weight.add_(0.02)  # type: ignore[union-attr]
            return merged

        network.merge_and_unload = merge_too_much  # type: ignore[assignment]
        return network

    monkeypatch.setattr(lora, "_adapt", attach_and_spoil)
    with pytest.raises(RuntimeError, match=r"not merged rightly: log-probs changed by .* in training"):
        merge_lora(source, table, adapters, measure)
