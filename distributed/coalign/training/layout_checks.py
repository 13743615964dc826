"""Checks on the live model that items in shared rows get the log-probs of one response per row.

Knows the Engine protocol, no DeepSpeed and neither stage.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coalign.errors import UserError
from coalign.models.attention import complaint_of, use_dense, uses_blocks
from coalign.models.logprobs import evaluation_mode, to_device, token_logps
from coalign.training.engine import Engine
from coalign.training.micro_batches import Item, collate
from coalign.training.token_files import as_rows

logger = logging.getLogger("coalign")


def check_shared_prefix(engine: Engine, items: Sequence[Item], pad_id: int) -> None:
    """Raise UserError when the model does not compute shared-prefix groups exactly as separate rows.

    Compares log-probs of the largest, the longest and the shortest group in one row with those of one row per response.
    Called by every rank.
    """
    _compare_layouts(engine, _extremes(items), pad_id, True)


def check_packing(engine: Engine, items: Sequence[Item], pad_id: int) -> None:
    """Raise UserError when the model does not compute rows that items share exactly as separate ones.

    Compares log-probs of the longest and the shortest item in one row with those of one row each. Called by every rank.
    """
    _compare_layouts(engine, _extremes(items), pad_id, False)


def _extremes(items: Sequence[Item]) -> list[Item]:
    """Return the item with the most responses, the longest item and the shortest one, each once but at least two."""
    sizes = as_rows(items).sizes
    most = np.lexsort((sizes.prompt, sizes.responses))[-1]
    found = {int(most): None, int(sizes.longest.argmax()): None, int(sizes.longest.argmin()): None}
    chosen = [items[i] for i in found]
    return chosen if len(chosen) > 1 else chosen * 2


def _compare_layouts(engine: Engine, items: Sequence[Item], pad_id: int, shared_prefix: bool) -> None:
    """Raise UserError when log-probs of items in one row differ from those of one row per response.

    A model whose block masks are not exact is switched to dense masks, with a warning, and checked again.
    """
    what, key = ("shared-prefix groups", "shared_prefix=false") if shared_prefix else ("packed rows", "pack_tokens=0")
    with torch.no_grad(), evaluation_mode(engine.model):
        plain_N = token_logps(engine.model, to_device(collate(items, pad_id, False), engine.device))
        if uses_blocks(engine.model):
            complaint = _complaint_of_layout(engine, items, pad_id, shared_prefix, plain_N, Exception)
            if engine.mean([float(bool(complaint))])[0] == 0:
                return
            logger.warning("%s are computed without FlexAttention: %s", what, complaint or "another rank failed")
            use_dense(engine.model)
        expected = (TypeError, ValueError, IndexError)
        complaint = _complaint_of_layout(engine, items, pad_id, shared_prefix, plain_N, expected)
    if complaint:
        raise UserError(f"this model can't compute {what}: {complaint}; set train.{key}")


def _complaint_of_layout(
    engine: Engine,
    items: Sequence[Item],
    pad_id: int,
    shared_prefix: bool,
    plain_N: Tensor,
    expected: type[Exception] | tuple[type[Exception], ...],
) -> str:
    """Return how log-probs of items in one row go wrong, "" when they equal `plain_N`; so do `expected` errors."""
    batch = collate(items, pad_id, shared_prefix, [len(items)])
    try:
        together_N = token_logps(engine.model, to_device(batch, engine.device))
    except torch.OutOfMemoryError:
        raise
    except expected as error:
        return f"it rejects their attention mask ({error})"
    return complaint_of(together_N, plain_N, engine.dtype)
