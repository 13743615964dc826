"""Which rows items may share: those in which the live model computes the log-probs of one response per row.

Knows the Engine protocol, no DeepSpeed and neither stage.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coalign.config import TrainTable
from coalign.models.attention import complaint_of, use_dense, uses_blocks
from coalign.models.logprobs import evaluation_mode, to_device, token_logps
from coalign.training.engine import Engine
from coalign.training.micro_batches import Item, collate
from coalign.training.token_files import as_rows

logger = logging.getLogger("coalign")


def settle_layout(engine: Engine, items: Sequence[Item], pad_id: int, train: TrainTable, groups: bool) -> TrainTable:
    """Return the settings without the shared rows that the model does not compute exactly; the log names them.

    `groups` is True for items of several responses. Neither setting changes what is trained. Called by every rank.
    """
    alone = {"pack_tokens": 0, "shared_prefix": False}
    if groups and not train.shared_prefix:
        return train.model_copy(update=alone)  # packs of groups were compared with shared prefixes only
    if groups or train.pack_tokens:
        complaint = complaint_of_sharing(engine, items, pad_id, groups)
        if complaint:
            what = "a group's responses get rows of their own" if groups else "items get rows of their own"
            logger.info("%s, since this model can't compute shared ones: %s", what, complaint)
            return train.model_copy(update=alone)
    return train


def complaint_of_sharing(engine: Engine, items: Sequence[Item], pad_id: int, shared_prefix: bool) -> str:
    """Return how the model's log-probs go wrong in rows that items share, "" when they are exact.

    Compares the largest, the longest and the shortest item in one row with one row per response.
    Called by every rank, which all get an answer of the same truth.
    """
    complaint = _compare_layouts(engine, _extremes(items), pad_id, shared_prefix)
    failed = engine.mean([float(bool(complaint))])[0] > 0
    return complaint or ("another rank failed" if failed else "")


def _extremes(items: Sequence[Item]) -> list[Item]:
    """Return the items with the most responses and the most tokens, the longest and the shortest one, at least two."""
    sizes = as_rows(items).sizes
    most = np.lexsort((sizes.prompt, sizes.responses))[-1]
    places = (most, sizes.shared_tokens.argmax(), sizes.longest.argmax(), sizes.longest.argmin())
    found = {int(place): None for place in places}
    chosen = [items[i] for i in found]
    return chosen if len(chosen) > 1 else chosen * 2


def _compare_layouts(engine: Engine, items: Sequence[Item], pad_id: int, shared_prefix: bool) -> str:
    """Return a complaint when log-probs of items in one row differ from those of one row per response, else "".

    A model whose block masks are not exact is switched to dense masks, with a warning, and checked again.
    """
    what = "shared-prefix groups" if shared_prefix else "packed rows"
    with torch.no_grad(), evaluation_mode(engine.model):
        plain_N = token_logps(engine.model, to_device(collate(items, pad_id, False), engine.device))
        if uses_blocks(engine.model):
            complaint = _complaint_of_layout(engine, items, pad_id, shared_prefix, plain_N)
            if engine.mean([float(bool(complaint))])[0] == 0:
                return ""
            logger.warning("%s are computed without FlexAttention: %s", what, complaint or "another rank failed")
            use_dense(engine.model)
        return _complaint_of_layout(engine, items, pad_id, shared_prefix, plain_N)


def _complaint_of_layout(
    engine: Engine, items: Sequence[Item], pad_id: int, shared_prefix: bool, plain_N: Tensor
) -> str:
    """Return how log-probs of items in one row go wrong, "" when they equal `plain_N`."""
    batch = collate(items, pad_id, shared_prefix, [len(items)])
    try:
        together_N = token_logps(engine.model, to_device(batch, engine.device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from transformers' code of one of hundreds of families
        return f"it rejects their attention mask ({str(error).strip().partition(chr(10))[0]})"
    return complaint_of(together_N, plain_N, engine.dtype)
