"""Attention masks of rows that several items share, and of items whose responses share a prompt.

Used by batching. Knows no models. Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_mask(segments_BT: Tensor, dtype: torch.dtype, items_BT: Tensor | None = None) -> Tensor:
    """Return the additive mask (B, 1, T, T) of rows that hold items side by side, and an item's continuations too.

    `segments_BT` is -1 on padding, 0 on a prompt and k on its k-th continuation; `items_BT` tells the items of a row
    apart (one a row without it). A token sees what came before it in its item's prompt and in its own segment. Padding
    sees itself alone, so that no softmax runs over nothing.
    """
    width = segments_BT.shape[1]
    query_BT1, key_B1T = segments_BT.unsqueeze(2), segments_BT.unsqueeze(1)
    causal_TT = torch.ones(width, width, dtype=torch.bool, device=segments_BT.device).tril()
    visible_BTT = causal_TT & ((key_B1T == 0) | (key_B1T == query_BT1)) & (query_BT1 >= 0) & (key_B1T >= 0)
    if items_BT is not None:
        visible_BTT &= items_BT.unsqueeze(2) == items_BT.unsqueeze(1)
    visible_BTT |= torch.eye(width, dtype=torch.bool, device=segments_BT.device)
    mask_BTT = torch.zeros(visible_BTT.shape, dtype=dtype, device=segments_BT.device)
    return mask_BTT.masked_fill(~visible_BTT, torch.finfo(dtype).min).unsqueeze(1)
