"""The shape of a model as numbers: from a folder's config.json, from [model.random], from options, from a known name.

Counts parameters from published layer layouts. Knows no weights, and imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from coalign.config import LoraTable, RandomTable
from coalign.errors import UserError
from coalign.files import read_json

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
NUMBERS = ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocabulary", "context", "parameters")
MAX_NUMBER = 10**9  # the largest count or width accepted in a config.json
# Config keys of models that change their logits after the head; these are computed in full (logprobs.token_logps).
_CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A decoder-only model: widths and counts, and which extra weights its family has.

    `vocabulary` and `context` are in tokens. `given_parameters` replaces the count that follows from widths (0: no).
    """

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    context: int
    tied: bool = False
    gpt2: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    plain_head: bool = True
    fused_gelu: bool = False
    given_parameters: int = 0

    @property
    def query_width(self) -> int:
        """Return the width of all query heads together."""
        return self.num_heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Return the width of all key heads together, which is also that of the values."""
        return self.num_kv_heads * self.head_size


def llama_shape(
    name: str, layers: int, hidden: int, heads: tuple[int, int], rest: tuple[int, int, int], **more: Any
) -> Shape:
    """Return a Llama-like shape; `heads` are (query, key), `rest` is (intermediate, vocabulary, context)."""
    size = more.pop("head_size", hidden // heads[0])
    return Shape(name, layers, hidden, *heads, size, *rest, **more)


def random_shape(table: RandomTable) -> Shape:
    """Return the shape of a model with random weights; its tokenizer may end up with fewer tokens."""
    heads = (table.num_heads, table.num_heads)
    rest = (table.intermediate_size, table.vocab_size, table.context)
    return llama_shape("random weights", table.num_layers, table.hidden_size, heads, rest, tied=True)


def words_of_numbers(numbers: dict[str, int]) -> str:
    """Return the given options that describe a shape as a phrase, "" for none."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in NUMBERS if numbers.get(name))


def shape_of_numbers(numbers: dict[str, int]) -> Shape:
    """Return a Llama-like shape from options, at least layers and hidden.

    The defaults are Llama 2's: heads of 128, an MLP of 8/3 of the width rounded up to a multiple of 256, a vocabulary
    of 32,000. Raises UserError when layers or hidden is missing or the heads do not divide the width.
    """
    for option in ("layers", "hidden"):
        if not numbers.get(option):
            raise UserError(
                f"--{option} is missing: {words_of_numbers(numbers)} alone describe no model; give --layers and"
                " --hidden, or none of these numbers"
            )
    hidden = numbers["hidden"]
    heads = numbers.get("heads") or max(1, hidden // 128)
    if hidden % heads:
        raise UserError(f"--hidden {hidden} is not divisible by {heads} heads; give --heads")
    intermediate = numbers.get("intermediate") or -(-hidden * 8 // 3 // 256) * 256
    rest = (intermediate, numbers.get("vocabulary") or 32000, numbers.get("context") or 4096)
    kv_heads = numbers.get("kv_heads") or heads
    return llama_shape(
        "given", numbers["layers"], hidden, (heads, kv_heads), rest, given_parameters=numbers.get("parameters") or 0
    )


def read_shape(folder: Path) -> Shape:
    """Return the shape given by a model folder's config.json.

    Raises UserError for an unreadable file and for a family whose layers are unknown to coalign.
    """
    path = folder / "config.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no table; a Hugging Face config was expected")
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{path}: model_type {family!r} is none whose weights coalign can count ({', '.join(FAMILIES)}); give its"
            " shape with --layers, --hidden and --parameters"
        )
    try:
        return _gpt2_shape(str(folder), values) if family == "gpt2" else _llama_shape(str(folder), family, values)
    except KeyError as error:
        raise UserError(f"{path} has no value for {error}; a {family} config was expected") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _whole(values: dict[str, Any], key: str, default: int | None = None) -> int:
    """Return a width or a count; `default` where the key is missing or null. Raises KeyError and ValueError."""
    value = values[key] if default is None else values.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_NUMBER:
        raise ValueError(f"{key}={value!r:.40}: a whole number from 1 to {MAX_NUMBER} was expected")
    return value


def _llama_shape(name: str, family: str, values: dict[str, Any]) -> Shape:
    hidden, heads = _whole(values, "hidden_size"), _whole(values, "num_attention_heads")
    bias = bool(values.get("attention_bias", False))
    return Shape(
        name=name,
        num_layers=_whole(values, "num_hidden_layers"),
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=_whole(values, "num_key_value_heads", heads),
        head_size=_whole(values, "head_dim", hidden // heads),
        intermediate=_whole(values, "intermediate_size"),
        vocabulary=_whole(values, "vocab_size"),
        context=_whole(values, "max_position_embeddings", 4096),
        tied=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias and family != "qwen2",
        mlp_bias=bool(values.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        plain_head=not any(values.get(key) for key in _CHANGED_LOGITS),
    )


def _gpt2_shape(name: str, values: dict[str, Any]) -> Shape:
    hidden, heads = _whole(values, "n_embd"), _whole(values, "n_head")
    return Shape(
        name=name,
        num_layers=_whole(values, "n_layer"),
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden // heads,
        intermediate=_whole(values, "n_inner", 4 * hidden),
        vocabulary=_whole(values, "vocab_size"),
        context=_whole(values, "n_positions"),
        tied=bool(values.get("tie_word_embeddings", True)),
        gpt2=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        fused_gelu=values.get("activation_function", "gelu_new") == "gelu",
    )


def linear_layers(shape: Shape) -> list[tuple[str, int, int]]:
    """Return (module name, inputs, outputs) of every linear map of one layer."""
    h, q, kv, f = shape.hidden, shape.query_width, shape.kv_width, shape.intermediate
    if shape.gpt2:
        return [("c_attn", h, 3 * h), ("c_proj", h, h), ("c_fc", h, f), ("c_proj", f, h)]
    attention = [("q_proj", h, q), ("k_proj", h, kv), ("v_proj", h, kv), ("o_proj", q, h)]
    return [*attention, ("gate_proj", h, f), ("up_proj", h, f), ("down_proj", f, h)]


def count_parameters(shape: Shape) -> int:
    """Return the number of weights: embeddings, layers, norms, and the head unless it is tied to the embeddings."""
    if shape.given_parameters:
        return shape.given_parameters
    h, q, kv, f = shape.hidden, shape.query_width, shape.kv_width, shape.intermediate
    matrices = sum(inputs * outputs for _, inputs, outputs in linear_layers(shape))
    biases = shape.qkv_bias * (q + 2 * kv) + shape.output_bias * h
    biases += shape.mlp_bias * (f + h if shape.gpt2 else 2 * f + h)
    norm = 2 * h if shape.gpt2 else h  # a LayerNorm has a bias, an RMSNorm has none
    layer = matrices + biases + 2 * norm + shape.qk_norm * 2 * shape.head_size
    positions = shape.context * h if shape.gpt2 else 0
    return shape.vocabulary * h * (1 if shape.tied else 2) + positions + shape.num_layers * layer + norm


def count_lora_parameters(shape: Shape, table: LoraTable) -> int:
    """Return the number of adapter weights: rank x (inputs + outputs) per adapted linear map (arXiv 2106.09685).

    Raises UserError when `target_modules` names no map of the model.
    """
    layers = linear_layers(shape)
    names = {name for name, _, _ in layers}
    unknown = [name for name in table.target_modules if name.rpartition(".")[2] not in names]
    if unknown:
        raise UserError(
            f"model.lora.target_modules names {unknown[0]!r}; linear layers here: {', '.join(sorted(names))}"
        )
    wanted = {name.rpartition(".")[2] for name in table.target_modules} or names
    return shape.num_layers * sum(table.rank * (inputs + outputs) for name, inputs, outputs in layers if name in wanted)


def shape_of(config: Any) -> Shape:
    """Return the widths that a forward pass's memory depends on, from the transformers config of any family."""
    heads = config.num_attention_heads
    return Shape(
        name=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        context=getattr(config, "max_position_embeddings", 0),
    )
