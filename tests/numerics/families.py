"""A tiny model of every family of causal language models that transformers has, made from its config class.

Knows transformers' registry, no step of a run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from coalign.config import RandomTable
from coalign.models.random_model import make_random_model

CONTEXT = 256
_TOKENIZER = RandomTable(vocab_size=400, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8, context=CONTEXT)

# The names under which configs keep a size, and what it becomes. A config takes those that it has.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"), CONTEXT),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k"), 2),
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
# What a family needs beside the sizes, by its model_type.
_SPECIAL: dict[str, dict[str, Any]] = {}


def all_families() -> list[str]:
    """Return the model types that transformers opens as a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, vocabulary: int) -> Any:
    """Return a config of the family with two layers, a width of 32 and `vocabulary` tokens."""
    kind = CONFIG_MAPPING[family]
    known = kind().to_dict()
    changed = {key: value for key, value in {**_SIZES, "vocab_size": vocabulary}.items() if key in known}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 4}
    return kind(**{**changed, **special, **_SPECIAL.get(family, {})})


def make_tiny(family: str, folder: Path) -> None:
    """Write a folder with a random model of the family, a small tokenizer and its chat template."""
    make_random_model(folder, ["some text", "another text"], _TOKENIZER, seed=0)
    vocabulary = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    config = tiny_config(family, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
