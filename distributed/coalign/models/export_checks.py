"""What must hold of an exported model: its weights are the trained ones, and merging adapters changed no log-prob.

Knows tensors by name, no files. Shape suffix: N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

MERGE_ROUNDING, MERGE_SHARE = 1e-4, 0.01  # of log-probs per token in float32, and of their change in training


def main_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """Return the dtype of most weights."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def complaint_of_reopened(reopened: dict[str, Tensor], state: dict[str, Tensor]) -> str | None:
    """Return how the weights of a reopened folder differ from `state`, or None; names are those in the live model."""
    missing = [name for name in state if name not in reopened]
    if missing or len(reopened) != len(state):
        return f"reopened with other keys (first missing: {missing[:1] or sorted(set(reopened) - set(state))[:1]})"
    for name, tensor in state.items():
        # Some families open a few weights in float32, whatever the dtype of the folder.
        if tensor.shape != reopened[name].shape or not torch.equal(reopened[name].to(tensor.dtype), tensor):
            return f"{name} was reopened with other values"
    return None


def complaint_of_merge(merged_N: Tensor, trained_N: Tensor, untouched_N: Tensor) -> str | None:
    """Return a message when merging changed log-probs by more than rounding and a hundredth of the training, or None.

    All are log-probs of the same tokens in float32: of the merged weights, with the adapters beside the weights, and
    without them.
    """
    difference, change = (float((x - trained_N).abs().mean()) for x in (merged_N, untouched_N))
    if difference <= max(MERGE_ROUNDING, MERGE_SHARE * change):
        return None
    return f"log-probs changed by {difference:.2g} per token, and by {change:.2g} in training"
