"""The head of a model and log-softmax in one: log-probs of given tokens, logits one block of the vocabulary at a time.

Knows no batches. Shape suffixes: N wanted tokens, U hidden states, D hidden size, V vocabulary, C columns of one block
of the vocabulary, P distinct places (hidden state, token) that are wanted in a block.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from coalign.models.sizes import BLOCK_LOGITS_CPU, BLOCK_LOGITS_GPU, KEPT_LOGITS_GPU, MIN_COLUMNS

logger = logging.getLogger("coalign")


def fused_logps(hidden_UD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, row_N: Tensor, target_N: Tensor) -> Tensor:
    """Return log softmax(hidden W^T + b)[row_N, target_N]: (N,), in float32 or wider.

    In both passes logits exist for one block of the vocabulary at a time. Between the passes their logsumexp is kept,
    and on a GPU as many blocks as KEPT_LOGITS_GPU allows.
    """
    keep = hidden_UD.is_cuda and torch.is_grad_enabled()
    args = (hidden_UD, weight_VD, bias_V, row_N, target_N, KEPT_LOGITS_GPU if keep else 0)
    found: Tensor = _FusedLogps.apply(*args)  # type: ignore[no-untyped-call]
    return found


class _FusedLogps(torch.autograd.Function):
    """The gradient: d logp_n / d logits_uv = [row_n = u] ([target_n = v] - softmax_uv)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_UD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        row_N: Tensor,
        target_N: Tensor,
        room: int,
    ) -> Tensor:
        wide = torch.promote_types(hidden_UD.dtype, torch.float32)
        logsumexp_U = torch.full((len(hidden_UD),), -torch.inf, dtype=wide, device=hidden_UD.device)
        picked_N = torch.zeros(len(row_N), dtype=wide, device=hidden_UD.device)
        kept: list[Tensor] = []
        for block in _blocks(hidden_UD, weight_VD):
            logits_UC = _block_logits(hidden_UD, weight_VD, bias_V, block)
            column_N, inside_N = _columns(target_N, block)
            picked_N = torch.where(inside_N, logits_UC[row_N, column_N].to(wide), picked_N)
            logsumexp_U = torch.logaddexp(logsumexp_U, _elementwise(_logsumexp, logits_UC))
            room -= logits_UC.numel()
            if room >= 0:
                kept.append(logits_UC)
        ctx.save_for_backward(hidden_UD, weight_VD, bias_V, row_N, target_N, logsumexp_U, *kept)
        return picked_N - logsumexp_U[row_N]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden_UD, weight_VD, bias_V, row_N, target_N, logsumexp_U, *kept = ctx.saved_tensors
        grad_U = torch.zeros_like(logsumexp_U).index_add_(0, row_N, grad_N)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        of_hidden_UD = torch.zeros_like(hidden_UD, dtype=grad_N.dtype) if needs_hidden else None
        of_weight_VD = torch.empty_like(weight_VD) if needs_weight else None
        of_bias_V = torch.empty_like(bias_V) if needs_bias else None
        blocks = list(_blocks(hidden_UD, weight_VD))
        targets = _targets_by_block(row_N, target_N, grad_N, len(hidden_UD), blocks)
        for block, (row_P, column_P, of_target_P) in zip(blocks, targets, strict=True):
            logits_UC = kept.pop(0) if kept else _block_logits(hidden_UD, weight_VD, bias_V, block)
            # Near probability 1 the two terms cancel, so they are added before rounding to the head's dtype.
            share_P = (logits_UC[row_P, column_P] - logsumexp_U[row_P]).exp_()
            of_logits_UC = _elementwise(_softmax_term, logits_UC, logsumexp_U, grad_U)
            of_logits_UC[row_P, column_P] = (of_target_P - share_P * grad_U[row_P]).to(of_logits_UC.dtype)
            if of_hidden_UD is not None:
                of_hidden_UD += of_logits_UC @ weight_VD[block]
            if of_weight_VD is not None:
                torch.mm(of_logits_UC.t(), hidden_UD, out=of_weight_VD[block])
            if of_bias_V is not None:
                torch.sum(of_logits_UC, 0, out=of_bias_V[block])
        of_hidden_UD = None if of_hidden_UD is None else of_hidden_UD.to(hidden_UD.dtype)
        return of_hidden_UD, of_weight_VD, of_bias_V, None, None, None


def _targets_by_block(
    row_N: Tensor, target_N: Tensor, grad_N: Tensor, num_rows: int, blocks: Sequence[slice]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (rows, columns, summed gradients) of the distinct targets in each block of the vocabulary."""
    place_P, place_N = torch.unique(target_N * num_rows + row_N, return_inverse=True)  # sorted by target
    grad_P = torch.zeros(len(place_P), dtype=grad_N.dtype, device=grad_N.device).index_add_(0, place_N, grad_N)
    edges = torch.tensor([0, *(block.stop for block in blocks)], device=place_P.device) * num_rows
    ends = torch.searchsorted(place_P, edges).tolist()
    return [
        (place_P[a:b] % num_rows, place_P[a:b] // num_rows - block.start, grad_P[a:b])
        for block, a, b in zip(blocks, ends, ends[1:], strict=False)
    ]


def _blocks(hidden_UD: Tensor, weight_VD: Tensor) -> Iterator[slice]:
    limit = BLOCK_LOGITS_GPU if hidden_UD.is_cuda else BLOCK_LOGITS_CPU
    width = max(limit // max(len(hidden_UD), 1), MIN_COLUMNS)
    return (slice(start, min(start + width, len(weight_VD))) for start in range(0, len(weight_VD), width))


def _block_logits(hidden_UD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, block: slice) -> Tensor:
    """Return the logits of a block of the vocabulary, rounded as the head rounds them; callers may change them."""
    return F.linear(hidden_UD, weight_VD[block], None if bias_V is None else bias_V[block])


def _logsumexp(logits_UC: Tensor) -> Tensor:
    """Return each row's logsumexp, in float32 or wider."""
    return torch.logsumexp(logits_UC.to(torch.promote_types(logits_UC.dtype, torch.float32)), dim=1)


def _softmax_term(logits_UC: Tensor, logsumexp_U: Tensor, grad_U: Tensor) -> Tensor:
    """Return -grad_u softmax_uv, rounded to the dtype of the logits; on a CPU it may overwrite them."""
    if logits_UC.device.type == "cpu" and logits_UC.dtype == logsumexp_U.dtype:
        return logits_UC.sub_(logsumexp_U.unsqueeze(1)).exp_().mul_(-grad_U.unsqueeze(1))
    wide_UC = logits_UC.to(logsumexp_U.dtype)
    return ((wide_UC - logsumexp_U.unsqueeze(1)).exp() * -grad_U.unsqueeze(1)).to(logits_UC.dtype)


def _elementwise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call an elementwise function; on a GPU it is compiled, so that its passes over the logits become few kernels."""
    return (_compiled(function) if tensors[0].is_cuda else function)(*tensors)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function compiled for all sizes, or the function itself where compiling fails."""
    fast = torch.compile(function, dynamic=True)
    example = torch.zeros(4, 8, device="cuda", dtype=torch.bfloat16)
    vector = torch.zeros(4, device="cuda")
    try:
        fast(example, *([] if function is _logsumexp else [vector, vector]))
    except Exception as error:
        logger.warning("log-probs are computed without compiled kernels: %s", str(error).splitlines()[0])
        return function
    return fast


def _columns(target_N: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return each target's column in a block, arbitrary for targets elsewhere, and whether it lies in it: (N,) each."""
    inside_N = (target_N >= block.start) & (target_N < block.stop)
    return (target_N - block.start).clamp(0, block.stop - block.start - 1), inside_N
