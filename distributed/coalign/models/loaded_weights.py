"""A causal LM from its files, with every one of its weights taken from there.

A weight that a file lacks is drawn at random, and one that the model has no place for is left out. Either makes another
model than the folder's. The only import of safetensors. Knows no texts and no training.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from coalign.config import ModelTable
from coalign.errors import UserError
from coalign.models.architecture import opening_options

# Buffers that older versions saved, and layers that predict further tokens: a causal LM computes the same without.
_WITHOUT_EFFECT = re.compile(r"(inv_freq|masked_bias|position_ids|_extra_state)$|(^|\.)mtp[._]")
# The parts of a model for images or sound, which its text part leaves out.
_OTHER_SENSES = re.compile(
    r"(^|[._])(vision|visual|vit|image|img|audio|speech|multi_?modal|mm|projector|connector|aligner)([._]|$)"
)


def open_causal_lm(folder: str, table: ModelTable, dtype: torch.dtype, **placement: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model of a folder or hub name, and transformers' report on its weights.

    Raises what transformers raises. `placement` is its `device_map` and `max_memory`.
    """
    opened: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        revision=table.revision,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report
        **opening_options(folder, table),
        **placement,
    )
    model, report = opened
    return model, report


def open_checked(folder: str, table: ModelTable, dtype: torch.dtype, **placement: Any) -> Any:
    """Return the model of a folder or hub name, with every weight taken from its files.

    Raises UserError for files that are malformed, lack a weight, or hold one of another shape or of another model.
    """
    try:
        with held_messages():
            model, report = open_causal_lm(folder, table, dtype, **placement)
            complaint = complaint_of_weights(model, report) or complaint_of_head(model, folder)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers and its parts raise any kind for a folder that is malformed
        raise UserError(f"{folder}: the model can't be loaded: {reason_of(error, table)}") from error
    if complaint:
        raise UserError(f"{folder}: {complaint}")
    return model


@contextlib.contextmanager
def held_messages(source: str = "") -> Iterator[None]:
    """Print what transformers logs only once the work has succeeded, without its report on weights.

    An error says in one line what these messages are about. `source` is in the names of the modules to be printed.
    """
    library = logging.getLogger("transformers")
    handlers, keeper = library.handlers, BufferingHandler(10**6)
    library.handlers = [keeper]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.handlers = handlers
    for record in keeper.buffer:
        answered = any(words in record.getMessage() for words in ("LOAD REPORT", "not sharded"))
        if source in record.name and not answered:
            library.callHandlers(record)


def reason_of(error: Exception, table: ModelTable) -> str:
    """Return what a library's error means for a model folder, in one line, and what to do."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "it needs code of its own (auto_map), and coalign runs no code from model folders; use a model that"
            " transformers supports itself"
        )
    if "attn_implementation" in text or "FlashAttention" in text:
        other = "sdpa" if table.attention == "flash_attention_2" else "eager"
        return f'model.attention="{table.attention}" can\'t be used with it; set model.attention="{other}"'
    if "automatic conversion of the weights" in text:
        return "parts of one of its fused weights (such as experts) are missing or unlike in shape; download it again"
    if "can't allocate memory" in text:
        return f"this machine has too little memory for it ({first_line(error)})"
    return f"{first_line(error).rstrip('.')}; check the files of the folder, or download the model again"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, with the kind of error where the message is a bare word."""
    first, _, rest = str(error).strip().partition("\n")
    if first.endswith(":"):
        first = f"{first} {rest.strip().partition(chr(10))[0]}".strip()
    return first if " " in first else f"{type(error).__name__} {first}".strip()


def complaint_of_weights(model: Any, report: dict[str, Any]) -> str:
    """Return what is wrong with a loaded model's weights, "" when each came from its file.

    `report` is transformers' loading info: missing, unexpected and mismatched keys, without those that tying explains
    and those that the model's class ignores.
    """
    missing = [name for name in model.state_dict() if name in report["missing_keys"]]
    missing += sorted(set(report["missing_keys"]) - set(missing))
    unknown = sorted((n for n in report["unexpected_keys"] if not _may_be_left_out(n, model.config)), key=_by_number)
    if missing:
        return f"its weights lack {missing[0]}{_and_more(missing)}; {_advice(missing[0], unknown)}"
    if report["mismatched_keys"]:
        name, found, expected = min(report["mismatched_keys"], key=lambda entry: _by_number(entry[0]))
        return (
            f"its weight {name} has the shape {list(found)}, and config.json asks for {list(expected)}"
            f"{_and_more(report['mismatched_keys'])}; correct config.json, or download the model again"
        )
    if unknown:
        return (
            f"its files hold a weight that {type(model).__name__} has no place for: {unknown[0]}{_and_more(unknown)};"
            " config.json must describe the whole model, and a head for rewards or classes can't be trained here"
        )
    return ""


def complaint_of_head(model: Any, folder: str) -> str:
    """Return a message when a folder's config ties the head to the embeddings and its files hold another head, else "".

    transformers then ties them under ZeRO-3, and leaves them apart otherwise. A model without values (on the meta
    device) is compared by the files of a local folder.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight or not getattr(model.config, "tie_word_embeddings", False):
        return ""
    if head.weight.is_meta:
        names = {id(weight): name for name, weight in model.named_parameters()}
        ends = tuple(".".join(names[id(module.weight)].split(".")[-2:]) for module in (head, embedding))
        found = []
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="pt") as tensors:
                found += [tensors.get_tensor(name) for name in tensors.keys() if name.endswith(ends)]  # noqa: SIM118
        if all(torch.equal(tensor, found[0]) for tensor in found):
            return ""
    return (
        "config.json ties the output head to the embeddings, and its files hold another head; set tie_word_embeddings"
        " to false in config.json, or take the head out of the files"
    )


def _advice(missing: str, unknown: list[str]) -> str:
    """Return what to do about a missing weight; one that the file has under another prefix is named."""
    tail = missing.partition(".")[2] or missing
    for name in unknown:
        if name.endswith(f".{missing}"):
            return f'the file has it as {name}: take "{name.removesuffix(missing)}" off its names'
        if name.endswith(f".{tail}"):
            return f"the file has {name} instead: rename its weights"
    return "config.json must belong to these weights; correct it, or convert or download the model again"


def _and_more(names: Any) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _may_be_left_out(name: str, config: Any) -> bool:
    if _WITHOUT_EFFECT.search(name) or _OTHER_SENSES.search(name):
        return True
    text_config = config.get_text_config()
    layers = getattr(text_config, "num_hidden_layers", None) or 0
    further = getattr(text_config, "num_nextn_predict_layers", None) or 0
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return layer is not None and layers <= int(layer[1]) < layers + further


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
