"""Log-probs of response tokens, computed only at the positions that predict one and without holding all logits.

Knows no wordings, rewards or engines. Shape suffixes: B rows, T tokens, K kept positions, N response tokens,
U positions that predict at least one, R responses, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.models.attention import BLOCK, RowLayout, mask_for, uses_blocks
from coalign.models.fused_head import fused_logps
from coalign.models.sizes import padded_size

# Whether a model returns its head's output unchanged, by head; tested once.
_returned_unchanged: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Batch:
    """The inputs of one forward pass, and where its response tokens are predicted.

    Rows are aligned at the right, so that the last `num_kept` positions predict all responses. `kept_index_N` points
    into the flattened (B, num_kept) positions; `target_N` is the token predicted there and `response_N` the response
    it belongs to. `attention_mask` is (B, T), or the layout of rows that several sequences share. `num_real_tokens`
    leaves padding out.
    """

    input_ids_BT: Tensor
    attention_mask: Tensor | RowLayout
    position_ids_BT: Tensor
    num_kept: int
    kept_index_N: Tensor
    target_N: Tensor
    response_N: Tensor
    num_responses: int
    num_real_tokens: int


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with all its tensors on a device."""
    values: dict[str, Any] = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor | RowLayout) else v for k, v in values.items()}
    return Batch(**moved)


def widen(batch: Batch, width: int) -> Batch:
    """Return a batch of shared rows, padded at the left to `width` tokens; predictions keep their places."""
    layout = batch.attention_mask
    assert isinstance(layout, RowLayout)
    missing = (width - batch.input_ids_BT.shape[1], 0)
    return dataclasses.replace(
        batch,
        input_ids_BT=F.pad(batch.input_ids_BT, missing),
        position_ids_BT=F.pad(batch.position_ids_BT, missing),
        attention_mask=RowLayout(
            F.pad(layout.segments_BT, missing, value=-1),
            F.pad(layout.items_BT, missing, value=-1),
            F.pad(layout.positions_BT, missing),
        ),
    )


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Switch dropout off (adapters may have it) while log-probs are measured; then restore each module's mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def token_logps(model: Any, batch: Batch) -> Tensor:
    """Return log P(token given the tokens it sees) of every response token of a batch: (N,), in float32 or wider.

    In a model that returns its head's output unchanged, the head's module computes log-probs instead of logits
    (`fused_logps`). It is still called as a module, so that ZeRO-3 gathers its weights. Under block masks, shared rows
    are padded to few widths, each of which has its own kernel.
    """
    if uses_blocks(model) and isinstance(batch.attention_mask, RowLayout):
        batch = widen(batch, padded_size(batch.input_ids_BT.shape[1], BLOCK))
    head = _plain_head(model)
    if head is None or not _returns_unchanged(model, head, batch.input_ids_BT):
        return _logps_from_logits(model, batch)
    position_U, row_N = torch.unique(batch.kept_index_N, return_inverse=True)

    def logps(hidden_BTD: Tensor) -> Tensor:
        device = head.weight.device  # on several GPUs it may differ from the batch's
        hidden_BKD = hidden_BTD[:, -batch.num_kept :].to(device)
        hidden_UD = hidden_BKD.reshape(-1, hidden_BKD.shape[-1]).index_select(0, position_U.to(device))
        rows_N, target_N = row_N.to(device), batch.target_N.to(device)
        return fused_logps(hidden_UD, head.weight, head.bias, rows_N, target_N).view(1, -1, 1)

    with _forward_of(head, logps):
        return _logits(model, batch.input_ids_BT, batch.attention_mask, batch.position_ids_BT, batch.num_kept).view(-1)


def _logits(model: Any, ids_BT: Tensor, mask: Tensor | RowLayout, positions_BT: Tensor, num_kept: int) -> Tensor:
    inputs = {"input_ids": ids_BT, "attention_mask": mask_for(model, mask), "position_ids": positions_BT}
    logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=num_kept).logits
    return logits


def _logps_from_logits(model: Any, batch: Batch) -> Tensor:
    logits_BKV = _logits(model, batch.input_ids_BT, batch.attention_mask, batch.position_ids_BT, batch.num_kept)
    logits_BKV = logits_BKV[:, -batch.num_kept :]  # a model may ignore logits_to_keep
    logits_NV = logits_BKV.reshape(-1, logits_BKV.shape[-1])[batch.kept_index_N]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    picked_N: Tensor = logits_NV.gather(1, batch.target_N.unsqueeze(1)).squeeze(1)
    return picked_N - torch.logsumexp(logits_NV, dim=-1)


def _plain_head(model: Any) -> nn.Linear | None:
    """Return the output head of a model, bare or wrapped by an engine, if it is a plain linear map, else None."""
    find = getattr(getattr(model, "module", model), "get_output_embeddings", None)
    head = find() if find else None
    return head if type(head) is nn.Linear else None


def _returns_unchanged(model: Any, head: nn.Linear, input_ids_BT: Tensor) -> bool:
    """Return whether the model's logits are its head's output: not scaled, capped or cut.

    Tested once per model, on one token whose logits are replaced by numbers that any such change would alter.
    """
    if head not in _returned_unchanged:
        seen: list[Tensor] = []

        def answer(hidden_BTD: Tensor) -> Tensor:
            seen.append(torch.linspace(-90, 90, head.out_features, device=hidden_BTD.device).to(hidden_BTD.dtype))
            return seen[-1].expand(*hidden_BTD.shape[:-1], -1).clone()

        ids_11 = input_ids_BT[:1, -1:]
        # Dropout would draw random numbers here that a resumed run draws at another update.
        with torch.no_grad(), evaluation_mode(model), _forward_of(head, answer):
            logits = _logits(model, ids_11, torch.ones_like(ids_11), torch.zeros_like(ids_11), 1)
        same = len(seen) == 1 and logits.numel() == seen[0].numel()
        _returned_unchanged[head] = same and torch.equal(logits.view(-1), seen[0].to(logits.dtype))
    return _returned_unchanged[head]


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's forward function inside the context; its hooks still run."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def sum_by_response(logp_N: Tensor, batch: Batch) -> Tensor:
    """Return the summed log-prob of each response: (R,)."""
    return torch.zeros(batch.num_responses, dtype=logp_N.dtype, device=logp_N.device).index_add(
        0, batch.response_N, logp_N
    )
