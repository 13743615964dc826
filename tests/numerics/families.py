"""A tiny model of every family of causal language models that transformers has, made from its config class.

Knows transformers' registry, no step of a run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
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
# What a family needs beside the sizes, by its model_type; of a hybrid model, a layer of each kind.
_LINEAR = {
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
}
_NEXT = {**_LINEAR, "layer_types": ["linear_attention", "full_attention"]}
_MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16,
    "v_head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "head_dim": 8,
}  # fmt: skip
_TEXT_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
    "num_key_value_heads", "head_dim", "initializer_range",
)  # fmt: skip
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "glm4_moe_lite": _LATENT,
    "gemma4_text": {
        "global_head_dim": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 400, "layer_types": ["sliding_attention", "full_attention"],
    },
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 64},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "mistral": {"sliding_window": 64},
    "olmo_hybrid": _NEXT,
    "qwen3_5_moe_text": _NEXT,
    "qwen3_5_text": _NEXT,
    "qwen3_next": _NEXT,
    "reformer": {"is_decoder": True},
    "youtu": _LATENT,
    "zamba2": {**_MAMBA2, "num_hidden_layers": 2, "layer_types": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


# Models of several kinds of input: what their text part and the rest need beside the sizes.
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_SEVERAL_KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
        {"vision_config": _VISION, "mm_tokens_per_image": 4},
    ),
    "gemma4": (
        {
            "global_head_dim": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True,
        },
        {"vision_config": {**_VISION, "num_key_value_heads": 4, "head_dim": 8}, "audio_config": None},
    ),
    "mistral3": ({"model_type": "mistral"}, {"vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8}}),
    "qwen3_5": (
        _NEXT,
        {
            "vision_config": {
                "depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32,
                "num_position_embeddings": 16,
            }
        },
    ),
}  # fmt: skip


def all_families() -> list[str]:
    """Return the model types that coalign may open: causal language models, and text parts of a few others."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *_SEVERAL_KINDS})


def tiny_config(family: str, vocabulary: int) -> Any:
    """Return a config of the family with two layers, a width of 32 and `vocabulary` tokens."""
    if family in _SEVERAL_KINDS:
        of_text, rest = _SEVERAL_KINDS[family]
        text = {key: value for key, value in _SIZES.items() if key in _TEXT_SIZES}
        tied = {"tie_word_embeddings": of_text.get("tie_word_embeddings", False)}
        special = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 4}
        text_config = {**text, **special, "vocab_size_per_layer_input": vocabulary, **of_text}
        return CONFIG_MAPPING[family](text_config=text_config, **tied, **rest)
    kind = CONFIG_MAPPING[family]
    known = kind().to_dict()
    changed = {key: value for key, value in {**_SIZES, "vocab_size": vocabulary}.items() if key in known}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 4}
    return kind(**{**changed, **special, **_SPECIAL.get(family, {})})


def num_parameters(family: str) -> int:
    """Return the number of weights of the family's tiny model; 0 where none can be made."""
    try:
        with torch.device("meta"):
            model = _opener(family).from_config(tiny_config(family, 300))
    except Exception:  # a config that wants more than sizes, or a library that is not installed
        return 0
    return sum(parameter.numel() for parameter in model.parameters())


def _opener(family: str) -> Any:
    return AutoModelForImageTextToText if family in _SEVERAL_KINDS else AutoModelForCausalLM


def make_tiny(family: str, folder: Path) -> None:
    """Write a folder with a random model of the family, a small tokenizer and its chat template."""
    make_random_model(folder, ["some text", "another text"], _TOKENIZER, seed=0)
    # The tokenizer classes of some families, such as Qwen2, add tokens of their own.
    vocabulary = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"] + 16
    config = tiny_config(family, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _opener(family).from_config(config)
    model.save_pretrained(folder)
