"""One step of a model: the next token of every row of a cache, and tests whether a way to compute it is exact.

Knows no sampling. Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from coalign.generation.cascade_attention import SharedPrompts, attending_in_cascade, may_cascade
from coalign.generation.kv_cache import SlotCache
from coalign.models.attention import complaint_of
from coalign.models.rows import TokenIds, left_pad

logger = logging.getLogger("coalign")

# Whether rows of a model can share a prompt's keys and values; tested once.
_cascades_exactly: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

StepFunction = Callable[[SlotCache, Tensor], Tensor]  # appends a token to every row; returns the logits after it


def next_logits(model: Any, cache: SlotCache, token_R: Tensor) -> Tensor:
    """Append a token to every row of a cache; return the logits after it: (R, V)."""
    cache.make_room()
    position_ids_R1 = cache.position_ids()
    shared = {}
    if cache.prompts is not None:
        cache.prompts.begin_step(position_ids_R1[:, 0])
        shared["shared_prompts"] = cache.prompts
    logits_R1V: Tensor = model(
        input_ids=token_R.unsqueeze(1),
        attention_mask=cache.attention_mask(),
        position_ids=position_ids_R1,
        past_key_values=cache,
        use_cache=True,
        **shared,
    ).logits
    cache.advance()
    return logits_R1V[:, -1]


def cascades_exactly(model: Any, codec: TokenIds) -> bool:
    """Return whether rows that share a prompt's keys and values get the same logits as rows with copies of them.

    Tested once per model, on two made-up prompts. A model with an attention of its own (ALiBi) fails.
    """
    if model not in _cascades_exactly:
        complaint = _complaint_of_cascade(model, codec)
        if complaint:
            logger.info("each sample gets a copy of its prompt's keys and values: %s", complaint)
        _cascades_exactly[model] = not complaint
    return _cascades_exactly[model]


def _complaint_of_cascade(model: Any, codec: TokenIds) -> str:
    if not may_cascade(model):
        return "the model has an attention of its own"
    with attending_in_cascade(model):
        shared = SlotCache(model.device, SharedPrompts(model.config))
        return complaint_of_step(model, codec, shared, functools.partial(next_logits, model))


@torch.no_grad()
def complaint_of_step(model: Any, codec: TokenIds, cache: SlotCache, step: StepFunction) -> str:
    """Return how `step` on a cache of its kind goes wrong, "" when its logits equal those of plain steps.

    Tested on two made-up prompts of different lengths with two tokens after each; `cache` must be empty.
    """
    vocabulary, device = model.config.get_text_config().vocab_size, model.device
    ids = [(7919 * k + 13) % vocabulary for k in range(1, 20)]
    prompts, tokens = [ids[:9], ids[9:13]], [torch.tensor(ids[k : k + 4], device=device) for k in (13, 15)]

    def logps(cache: SlotCache, step: StepFunction) -> Tensor:
        prefilled = DynamicCache()
        model(**left_pad(prompts, codec.pad_id, device), past_key_values=prefilled, use_cache=True, logits_to_keep=1)
        cache.admit(prefilled, [len(p) for p in prompts], [0, 0, 0, 1], (4, 11))
        return torch.stack([step(cache, token_R).float().log_softmax(-1) for token_R in tokens])

    plain = logps(SlotCache(device), functools.partial(next_logits, model))
    try:
        found = logps(cache, step)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return str(error).partition("\n")[0]
    return complaint_of(found, plain, model.dtype)
