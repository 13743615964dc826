"""Attention masks of shared-prefix groups, and the start-up check that a model computes them exactly.

Used by batching and training. Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_mask(segments_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (B, 1, T, T) of rows that hold one prompt and its continuations side by side.

    `segments_BT` is -1 on padding, 0 on the prompt and k on the k-th continuation: a token sees what came before it in
    the prompt and in its own segment. Padding sees itself alone, so that no softmax runs over nothing.
    """
    width = segments_BT.shape[1]
    query_BT1, key_B1T = segments_BT.unsqueeze(2), segments_BT.unsqueeze(1)
    causal_TT = torch.ones(width, width, dtype=torch.bool, device=segments_BT.device).tril()
    visible_BTT = causal_TT & ((key_B1T == 0) | (key_B1T == query_BT1)) & (query_BT1 >= 0) & (key_B1T >= 0)
    visible_BTT |= torch.eye(width, dtype=torch.bool, device=segments_BT.device)
    mask_BTT = torch.zeros(visible_BTT.shape, dtype=dtype, device=segments_BT.device)
    return mask_BTT.masked_fill(~visible_BTT, torch.finfo(dtype).min).unsqueeze(1)
