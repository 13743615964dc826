"""Attention masks of rows that several items share, and of items whose responses share a prompt.

Used by batching and training. Knows a model's config, no model. Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sliding_window(config: Any) -> tuple[int | None, bool]:
    """Return how many tokens back a model's layers see, with the one that looks (None: all), and whether all do."""
    text_config = config.get_text_config()
    window: int | None = getattr(text_config, "sliding_window", None)
    kinds = set(getattr(text_config, "layer_types", None) or ["sliding_attention"])
    if not window or "sliding_attention" not in kinds:
        return None, True
    return window, len(kinds) == 1


def group_mask(
    segments_BT: Tensor,
    dtype: torch.dtype,
    items_BT: Tensor | None = None,
    positions_BT: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Return the additive mask (B, 1, T, T) of rows that hold items side by side, and an item's continuations too.

    `segments_BT` is -1 on padding, 0 on a prompt and k on its k-th continuation; `items_BT` tells the items of a row
    apart (one a row without it). A token sees what came before it in its item's prompt and in its own segment,
    less than `window` positions back. Padding sees itself alone, so that no softmax runs over nothing.
    """
    width = segments_BT.shape[1]
    query_BT1, key_B1T = segments_BT.unsqueeze(2), segments_BT.unsqueeze(1)
    causal_TT = torch.ones(width, width, dtype=torch.bool, device=segments_BT.device).tril()
    visible_BTT = causal_TT & ((key_B1T == 0) | (key_B1T == query_BT1)) & (query_BT1 >= 0) & (key_B1T >= 0)
    if items_BT is not None:
        visible_BTT &= items_BT.unsqueeze(2) == items_BT.unsqueeze(1)
    if window is not None and positions_BT is not None:
        visible_BTT &= positions_BT.unsqueeze(2) - positions_BT.unsqueeze(1) < window
    visible_BTT |= torch.eye(width, dtype=torch.bool, device=segments_BT.device)
    mask_BTT = torch.zeros(visible_BTT.shape, dtype=dtype, device=segments_BT.device)
    return mask_BTT.masked_fill(~visible_BTT, torch.finfo(dtype).min).unsqueeze(1)
