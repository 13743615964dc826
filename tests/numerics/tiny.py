"""Tiny random networks of several families, and random items for them.."""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coalign.models.attention import mask_for
from coalign.models.logprobs import Batch
from coalign.training.micro_batches import Item

VOCABULARY = 64
_SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
_MPT = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "gpt2": _GPT2,
    "qwen2": _GROUPED,
    "mistral": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "phi": _SHAPE,
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 64, "final_logit_softcapping": 2.0},
    "cohere": {**_GROUPED, "logit_scale": 0.25},
    "bloom": _BLOOM,
    "mpt": _MPT,
}
FAMILIES = ("llama", "gpt2", "qwen2", "mistral", "qwen3", "phi")


def network(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changed: Any) -> Any:
    """Return a random causal LM whose log-probs differ clearly from token to token (weights of std 0.2)."""
    config = AutoConfig.for_model(family, **{**SHAPES[family], "initializer_range": 0.2, **changed})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if dtype is torch.float64:
        for module in model.modules():  # these compute in float32 whatever their input
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = functools.partial(_rms_norm, module)
            elif type(module).__name__ == "CohereLayerNorm":
                module.forward = functools.partial(_layer_norm, module)
    return model


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    if hasattr(module, "variance_epsilon"):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], 1 + module.weight, module.eps)


def _layer_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], module.weight, None, module.variance_epsilon)


def plain_logps(model: Any, batch: Batch) -> torch.Tensor:
    """Return what logprobs.token_logps does from the logits of all positions: its slow twin."""
    logits_BTV = model(
        input_ids=batch.input_ids_BT,
        attention_mask=mask_for(model, batch.attention_mask),
        position_ids=batch.position_ids_BT,
    ).logits
    logp_BKV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)).log_softmax(-1)[:, -batch.num_kept :]
    return logp_BKV.reshape(-1, logp_BKV.shape[-1])[batch.kept_index_N, batch.target_N]


def random_ids(source: random.Random, length: int) -> tuple[int, ...]:
    """Return token ids above the special ones."""
    return tuple(source.randrange(3, VOCABULARY) for _ in range(length))


def random_items(count: int, seed: int = 0, most_responses: int = 4, longest: int = 5) -> list[Item]:
    """Return groups of unlike prompt lengths, response lengths (from one token), sizes and rewards."""
    source = random.Random(seed)
    items = []
    for number in range(count):
        size = source.randint(1, most_responses)
        responses = tuple(random_ids(source, source.randint(1, longest)) for _ in range(size))
        rewards = tuple(source.randint(0, 2) for _ in range(size))
        prompt = random_ids(source, source.randint(2, 9))
        items.append(Item(f"row{number}", prompt, responses, rewards, rewards.index(max(rewards))))
    return items
