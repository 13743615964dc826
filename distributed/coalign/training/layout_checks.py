"""How an engine's model computes items: several in a row or one response a row, checked to be the same; the reference.

Used by training and its recipes. Knows only the Engine protocol declared here, no DeepSpeed, and no stage.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from coalign.config import TrainTable
from coalign.errors import UserError
from coalign.models.attention import complaint_of, use_dense, uses_blocks
from coalign.models.logprobs import Batch, evaluation_mode, sum_by_response, to_device, token_logps
from coalign.process import rank, world_size
from coalign.records import read_rows
from coalign.runs.atomic_files import write_rows
from coalign.training.micro_batches import Item, MicroBatch, collate, micro_batches
from coalign.training.token_files import TokenRows, as_rows

logger = logging.getLogger("coalign")

# Tokens of a row that items share, where train.pack_tokens leaves it open. A dense mask costs the square of a row.
PACK_ON_CPU, PACK_UNDER_MASK = 256, 1024
# Padding of a micro-batch, in tokens or as a share of it: what one micro-batch more would cost.
PADDING_ON_CPU, PADDING_SHARE_ON_GPU = 64, 1 / 8


class Engine(Protocol):
    """What the loop needs of an engine. `mean` averages over ranks; `backward` takes a share of one global sum."""

    device: torch.device
    dtype: torch.dtype

    @property
    def model(self) -> Any: ...
    def backward(self, loss: Tensor, last: bool) -> None: ...
    def step(self, learning_rate: float) -> float: ...
    def mean(self, values: Sequence[float]) -> list[float]: ...
    def save(self, folder: Path, state: dict[str, Any]) -> None: ...
    def restore(self, folder: Path) -> dict[str, Any]: ...


def check_shared_prefix(engine: Engine, items: Sequence[Item], pad_id: int) -> None:
    """Raise UserError when the model does not compute shared-prefix groups as it computes separate rows.

    Compares log-probs of the largest, the longest and the shortest group, which share a row, with those of one row a
    response, on the live model; called by every rank.
    """
    _compare_layouts(engine, _extremes(items), pad_id, True)


def check_packing(engine: Engine, items: Sequence[Item], pad_id: int) -> None:
    """Raise UserError when the model does not compute rows that items share as it computes separate ones.

    Compares log-probs of the longest and the shortest item both ways, on the live model; called by every rank.
    """
    _compare_layouts(engine, _extremes(items), pad_id, False)


def _extremes(items: Sequence[Item]) -> list[Item]:
    """Return the items with the most responses, with the longest and with the shortest of them, each once."""
    sizes = as_rows(items).sizes
    most = np.lexsort((sizes.prompt, sizes.responses))[-1]
    found = {int(most): None, int(sizes.longest.argmax()): None, int(sizes.longest.argmin()): None}
    chosen = [items[i] for i in found]
    return chosen if len(chosen) > 1 else chosen * 2


def _compare_layouts(engine: Engine, items: Sequence[Item], pad_id: int, shared_prefix: bool) -> None:
    """Raise UserError when log-probs of items in one row differ from those of one row a response.

    A model that attends by blocks, and not exactly, attends by dense masks from then on, which is said.
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
    """Return what is wrong with log-probs of items in one row, or nothing; `expected` errors count as wrong."""
    batch = collate(items, pad_id, shared_prefix, [len(items)])
    try:
        together_N = token_logps(engine.model, to_device(batch, engine.device))
    except torch.OutOfMemoryError:
        raise
    except expected as error:
        return f"it does not take their attention mask ({error})"
    return complaint_of(together_N, plain_N, engine.dtype)


def reference_logps(engine: Engine, items: Sequence[Item], pad_id: int, settings: TrainTable, path: Path) -> TokenRows:
    """Return the items with the starting model's summed log-probs as DPO's reference, stored in `path`.

    Called by every rank before the first update; a stored file is read instead.
    """
    if not path.exists():
        found = _all_logps(engine, items, pad_id, settings)
        if rank() == 0:
            rows = ({"name": item.name, "logps": list(logps)} for item, logps in zip(items, found, strict=True))
            write_rows(path, rows)
        engine.mean([0.0])  # the others wait until the file is there
    stored = {row["name"]: row["logps"] for _, row in read_rows(path)}
    flat = [logp for item in items for logp in stored[item.name]]
    return as_rows(items).with_reference(np.array(flat, np.float64))


def _all_logps(engine: Engine, items: Sequence[Item], pad_id: int, settings: TrainTable) -> list[tuple[float, ...]]:
    offsets = [0, *as_rows(items).sizes.responses.cumsum().tolist()]
    flat = [0.0] * offsets[-1]
    shared, budget = settings.shared_prefix, pack_budget(engine, settings)
    for start in range(0, len(items), 256):  # some at a time: micro-batches of like length, all ranks in step
        some = items[start : start + 256]
        position = {item.name: offset for item, offset in zip(some, offsets[start:], strict=False)}
        for part in micro_batches(some, settings.micro_batch_tokens, world_size(), shared, *budget)[rank()]:
            batch, _ = batch_of(engine, part, some[0], pad_id, shared)
            with torch.no_grad(), evaluation_mode(engine.model):
                logp_R = sum_by_response(token_logps(engine.model, batch), batch).tolist()
            values = iter(logp_R)
            for item in part.items:
                for k in range(len(item.responses)):
                    flat[position[item.name] + k] = next(values)
    total = [v * world_size() for v in engine.mean(flat)]
    return [tuple(total[a:b]) for a, b in itertools.pairwise(offsets)]


def pack_budget(engine: Engine, settings: TrainTable) -> tuple[int, int]:
    """Return how many tokens of a row items may share, and how many of a micro-batch may be padding.

    Blocks make a row of a whole micro-batch as cheap as its items alone; under a dense mask rows stay narrow.
    """
    whole = settings.micro_batch_tokens
    if engine.device.type == "cpu":
        widest, padding = PACK_ON_CPU, PADDING_ON_CPU * world_size()
    else:
        widest, padding = PACK_UNDER_MASK, round(whole * PADDING_SHARE_ON_GPU)
    if settings.pack_tokens >= 0:
        widest = settings.pack_tokens
    if settings.pack_tokens and uses_blocks(engine.model):
        widest = whole
    return min(widest, whole), padding


def batch_of(
    engine: Engine, part: MicroBatch, filler: Item, pad_id: int, shared_prefix: bool
) -> tuple[Batch, tuple[Item, ...]]:
    """Return a micro-batch on the device and its items; where nothing is left, `filler` for the collectives' sake."""
    items = part.items or (filler,)
    return to_device(collate(items, pad_id, shared_prefix, part.items_per_row), engine.device), items
