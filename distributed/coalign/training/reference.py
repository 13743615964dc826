"""The reference model's log-probs for DPO: measured once before the first update and stored.

Knows the Engine protocol, no DeepSpeed and no loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from coalign.config import TrainTable
from coalign.errors import UserError
from coalign.models.logprobs import evaluation_mode, sum_by_response, token_logps
from coalign.process import rank, world_size
from coalign.records import read_rows
from coalign.runs.atomic_files import write_rows
from coalign.training.engine import Engine
from coalign.training.micro_batches import Item, batch_of, micro_batches, pack_budget
from coalign.training.token_files import TokenRows, as_rows

AT_ONCE = 256  # items cut into micro-batches together: enough to find similar lengths


def reference_logps(engine: Engine, items: Sequence[Item], pad_id: int, settings: TrainTable, path: Path) -> TokenRows:
    """Return the items with the starting model's summed log-probs, in nats, as DPO's reference; `path` stores them.

    Called by every rank before the first update. When the file has them already it is read instead.
    """
    stored = _stored_logps(path, items)
    if stored is None:
        found = _all_logps(engine, items, pad_id, settings)
        if rank() == 0:
            rows = ({"name": item.name, "logps": list(logps)} for item, logps in zip(items, found, strict=True))
            write_rows(path, rows)
        engine.mean([0.0])  # the others read the file before anybody replaces it
        stored = found
    return as_rows(items).with_reference(np.array([logp for logps in stored for logp in logps], np.float64))


def _stored_logps(path: Path, items: Sequence[Item]) -> list[tuple[float, ...]] | None:
    """Return the log-probs in a file, in the order of the items; None when it lacks some, or is damaged."""
    try:
        stored = {row["name"]: tuple(map(float, row["logps"])) for _, row in read_rows(path)}
    except (UserError, LookupError, TypeError, ValueError):
        return None
    if any(len(stored.get(item.name, ())) != len(item.responses) for item in items):
        return None
    return [stored[item.name] for item in items]


def _all_logps(engine: Engine, items: Sequence[Item], pad_id: int, settings: TrainTable) -> list[tuple[float, ...]]:
    """Return the summed log-probs of each item's responses, the same on every rank."""
    offsets = [0, *as_rows(items).sizes.responses.cumsum().tolist()]
    flat = [0.0] * offsets[-1]
    shared, budget = settings.shared_prefix, pack_budget(engine, settings)
    for start in range(0, len(items), AT_ONCE):
        these = items[start : start + AT_ONCE]
        position = {item.name: offset for item, offset in zip(these, offsets[start:], strict=False)}
        for part in micro_batches(these, settings.micro_batch_tokens, world_size(), shared, *budget)[rank()]:
            batch, _ = batch_of(engine, part, these[0], pad_id, shared)
            with torch.no_grad(), evaluation_mode(engine.model):
                logp_R = sum_by_response(token_logps(engine.model, batch), batch).tolist()
            values = iter(logp_R)
            for item in part.items:
                for k in range(len(item.responses)):
                    flat[position[item.name] + k] = next(values)
    total = [v * world_size() for v in engine.mean(flat)]
    return [tuple(total[a:b]) for a, b in itertools.pairwise(offsets)]
