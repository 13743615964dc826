"""model_checks: what a model must do alone, behind padding, before later tokens and with a KV cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from coalign.errors import UserError
from coalign.models.model_checks import check_model, has_plain_cache
from numerics.families import tiny_config
from numerics.tiny import network


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, 64)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "mpt", "mistral"])
def test_models_with_attention_in_every_layer_pass(family: str, dtype: torch.dtype) -> None:
    model = network(family, dtype)
    training = model.training
    check_model(model, 0, "m", samples=True)
    assert has_plain_cache(model.config) and model.training == training


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("rwkv", "it ignores the mask of padding"),
        ("bert", "its tokens see later ones"),
        ("lfm2", "keeps more than keys and values"),
        ("mamba2", "keeps more than keys and values"),
        ("qwen3_next", "keeps more than keys and values"),
        ("openai-gpt", "can't be sampled from: it fails with RuntimeError"),
    ],
)
def test_others_are_refused_with_the_reason(family: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"^m: an? {family} model .*{said}"):
        check_model(tiny(family), 0, "m", samples=True)


@pytest.mark.parametrize("family", ["lfm2", "mamba2", "qwen3_next"])
def test_a_model_with_a_state_can_be_scored(family: str) -> None:
    """Its rows are right, alone and padded; only sampling moves rows between places."""
    check_model(tiny(family), 0, "m", samples=False)


def test_an_error_of_the_models_own_code_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("llama", torch.float32)

    def fail(**_: Any) -> None:
        raise KeyError("of\nmany lines")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(UserError, match=r"it fails with KeyError: 'of"):
        check_model(model, 0, "m", samples=False)
    monkeypatch.setattr(model, "forward", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        check_model(model, 0, "m", samples=False)
