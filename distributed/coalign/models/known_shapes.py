"""Published shapes, for a plan of a model that is not on this disk.

Knows names and numbers; imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from coalign.config import ModelTable
from coalign.errors import UserError
from coalign.models.shape import Shape, llama_shape, random_shape, read_shape

# Published shapes, for models without a local folder: {name: (shape, models of that shape on the hub)}.
KNOWN: dict[str, tuple[Shape, tuple[str, ...]]] = {
    "qwen2.5-0.5b": (
        llama_shape("Qwen2.5 0.5B", 24, 896, (14, 2), (4864, 151936, 32768), tied=True, qkv_bias=True),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"),
    ),
    "qwen2.5-1.5b": (
        llama_shape("Qwen2.5 1.5B", 28, 1536, (12, 2), (8960, 151936, 32768), tied=True, qkv_bias=True),
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct"),
    ),
    "1b": (
        llama_shape("Llama 3.2 1B", 16, 2048, (32, 8), (8192, 128256, 131072), tied=True),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"),
    ),
    "4b": (
        llama_shape("Qwen3 4B", 36, 2560, (32, 8), (9728, 151936, 40960), head_size=128, tied=True, qk_norm=True),
        ("Qwen/Qwen3-4B",),
    ),
    "7b": (
        llama_shape("Llama 2 7B", 32, 4096, (32, 32), (11008, 32000, 4096)),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf", "lmsys/vicuna-7b-v1.5"),
    ),
    "mistral-7b": (
        llama_shape("Mistral 7B", 32, 4096, (32, 8), (14336, 32000, 32768)),
        ("mistralai/Mistral-7B-v0.1",),
    ),
    "8b": (
        llama_shape("Llama 3.1 8B", 32, 4096, (32, 8), (14336, 128256, 131072)),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    ),
    "13b": (
        llama_shape("Llama 2 13B", 40, 5120, (40, 40), (13824, 32000, 4096)),
        ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf"),
    ),
    "32b": (
        llama_shape("Qwen2.5 32B", 64, 5120, (40, 8), (27648, 152064, 131072), qkv_bias=True),
        ("Qwen/Qwen2.5-32B", "Qwen/Qwen2.5-32B-Instruct"),
    ),
    "70b": (
        llama_shape("Llama 2 70B", 80, 8192, (64, 8), (28672, 32000, 4096)),
        ("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf"),
    ),
}


def find_shape(model: ModelTable) -> tuple[Shape, str]:
    """Return the shape of the model that a run starts from, and a phrase that says where it was found.

    Raises UserError when model.path is neither a local folder nor a model of a known shape.
    """
    if model.init == "random":
        return random_shape(model.random), "[model.random], at most vocab_size tokens"
    if Path(model.path, "config.json").is_file() and model.path:
        return read_shape(Path(model.path)), f"{model.path}/config.json"
    if model.path and Path(model.path).exists():
        raise UserError(f"{model.path} holds no config.json; a Hugging Face model folder was expected")
    for name, (shape, hub_names) in KNOWN.items():
        if model.path in hub_names:
            return shape, f"the known shape {name} of {model.path}, which is no local folder"
    raise UserError(
        f"model.path={model.path!r} is neither a local folder nor a known name; give its shape: --shape NAME"
        f" ({', '.join(KNOWN)}), or --layers and --hidden"
    )


def known_shape(name: str) -> Shape:
    """Return a known shape by its name. Raises UserError for any other name."""
    if name not in KNOWN:
        raise UserError(
            f"--shape {name}: no known shape; choose among {', '.join(KNOWN)}, or give --layers and --hidden"
        )
    return KNOWN[name][0]
