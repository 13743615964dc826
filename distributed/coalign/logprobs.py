"""Log-probs of response tokens, computed only at positions that predict one.

Used by training for every loss. Knows no wordings, rewards or engines. Shape suffixes: B rows, T tokens, K kept
positions, N response tokens, R responses, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one forward pass reads, and where its response tokens are predicted.

    Rows are aligned at the right, so that predictions of responses lie in the last `num_kept` positions;
    `kept_index_N` points into the flattened (B, num_kept) positions. `attention_mask` is (B, T), or (B, 1, T, T) for
    shared-prefix rows.
    """

    input_ids_BT: Tensor
    attention_mask: Tensor
    position_ids_BT: Tensor
    num_kept: int
    kept_index_N: Tensor
    target_N: Tensor
    response_N: Tensor
    num_responses: int
    num_real_tokens: int


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on a device."""
    values: dict[str, Any] = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
    return Batch(**moved)


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Switch dropout off (adapters may have some) while log-probs are measured, and training mode on again after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def token_logps(model: Any, batch: Batch) -> Tensor:
    """Return log P(token given what it may see) of every response token of a batch: (N,), in float32 at least."""
    logits_BKV = model(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids_BT,
        use_cache=False,
        logits_to_keep=batch.num_kept,
    ).logits
    if logits_BKV.shape[1] != batch.num_kept:  # a model that ignores logits_to_keep
        logits_BKV = logits_BKV[:, -batch.num_kept :]
    logits_NV = logits_BKV.reshape(-1, logits_BKV.shape[-1])[batch.kept_index_N]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    picked_N: Tensor = logits_NV.gather(1, batch.target_N.unsqueeze(1)).squeeze(1)
    return picked_N - torch.logsumexp(logits_NV, dim=-1)


def sum_by_response(logp_N: Tensor, batch: Batch) -> Tensor:
    """Return the summed log-prob of each response: (R,)."""
    return torch.zeros(batch.num_responses, dtype=logp_N.dtype, device=logp_N.device).index_add(
        0, batch.response_N, logp_N
    )
