"""The training loop of both stages: micro-batches, schedule, dev measurement, checkpoints, what is logged.

Used by launch/sft.py and launch/align.py. Knows only the Engine protocol of layouts, no DeepSpeed, and no stage:
a stage is its items and its objective.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coalign.config import LogTable, TrainTable
from coalign.errors import UserError
from coalign.models.logprobs import token_logps
from coalign.process import Preemption, rank, world_size
from coalign.training.checkpoints import _resume, _rotate
from coalign.training.engine import Engine
from coalign.training.micro_batches import Item, batch_of, micro_batches, pack_budget
from coalign.training.objectives import Objective
from coalign.training.token_files import as_rows
from coalign.training.training_log import TrainingLog

logger = logging.getLogger("coalign")


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """A whole training run: items in the order they are consumed, `batch_items` an update."""

    items: Sequence[Item]
    batch_items: int
    learning_rate: float
    pad_id: int

    @property
    def num_steps(self) -> int:
        """Return the number of updates; the last may be short."""
        return math.ceil(len(self.items) / self.batch_items)

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all rows, each group's prompt counted once."""
        return int(as_rows(self.items).sizes.shared_tokens.sum())


def learning_rate_at(step: int, num_steps: int, highest: float, settings: TrainTable) -> float:
    """Return the learning rate of update `step` (from 0): linear warm-up, then the schedule down to its final share."""
    warmup = round(settings.warmup_share * num_steps)
    if step < warmup:
        return highest * (step + 1) / warmup
    if settings.schedule == "constant":
        return highest
    progress = (step - warmup) / max(1, num_steps - warmup)
    falling = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return highest * (settings.final_lr_share + (1 - settings.final_lr_share) * falling)


def train(
    engine: Engine,
    plan: TrainingPlan,
    objective: Objective,
    settings: TrainTable,
    log: LogTable,
    folder: Path,
    measure: Callable[[], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Run or resume a training run and return its totals.

    Resumes at the newest whole checkpoint in `folder`, whatever the number of ranks then was. `measure` is the dev
    measurement. Raises UserError when the loss or gradient is no longer finite, with the names of the rows, and
    SystemExit when asked to stop (after a checkpoint).
    """
    preemption = Preemption()
    preemption.install()
    state = _resume(engine, folder)
    step, tokens = int(state["step"]), float(state["tokens"])
    writer = TrainingLog(folder, log, step)
    first: dict[str, float] | None = state["first_measure"]
    p_best: list[float] = state["p_best"]  # of the first and of the latest updates, for the warning
    if step == 0 and measure and settings.eval_every:
        first = measure()
        writer.write({"kind": "dev", "step": 0, **first})
    while step < plan.num_steps:
        started = time.monotonic()
        items = plan.items[step * plan.batch_items : (step + 1) * plan.batch_items]
        lr = learning_rate_at(step, plan.num_steps, plan.learning_rate, settings)
        line = _update(engine, items, objective, plan.pad_id, settings, lr)
        step += 1
        tokens += line["tokens"]
        p_best = _watch_best(p_best, line.get("p_best"))
        seconds = time.monotonic() - started
        writer.write(
            {"kind": "train", "step": step, **line, "tokens_per_second": line["tokens"] / seconds}, plan.num_steps
        )
        if measure and settings.eval_every and (step % settings.eval_every == 0 or step == plan.num_steps):
            measured = measure()
            writer.write({"kind": "dev", "step": step, **measured})
            if first:
                _warn_of_decay(first, measured)
        stop = engine.mean([float(preemption.requested())])[0] > 0
        # The last update is kept too, so that an export that fails or is killed does not cost training again.
        due = settings.checkpoint_every and (step % settings.checkpoint_every == 0 or step == plan.num_steps)
        if due or (stop and step < plan.num_steps):
            checkpoint = folder / "checkpoints" / f"step_{step:06d}"
            engine.save(checkpoint, {"step": step, "tokens": tokens, "first_measure": first, "p_best": p_best})
            _rotate(checkpoint, settings.keep_last)
        if stop and step < plan.num_steps:
            writer.close()
            raise SystemExit(f"stopped by a signal after update {step}; run the same command again to go on")
    writer.close()
    preemption.remove()
    return {"updates": step, "tokens": int(tokens)}


def _update(
    engine: Engine, items: Sequence[Item], objective: Objective, pad_id: int, settings: TrainTable, lr: float
) -> dict[str, float]:
    """Make one update and return its log line; the loss does not depend on how items are split or dealt out."""
    denominator = objective.denominator(items)
    budget, shared = pack_budget(engine, settings), objective.shared_prefix
    mine = micro_batches(items, settings.micro_batch_tokens, world_size(), shared, *budget)[rank()]
    losses: list[Tensor] = []
    sums: dict[str, float | Tensor] = {}
    tokens = 0
    for index, part in enumerate(mine):
        batch, rows = batch_of(engine, part, items[0], pad_id, shared)
        loss, parts = objective.loss(token_logps(engine.model, batch), batch, rows, denominator)
        weight = 1.0 if part.items else 0.0
        engine.backward(loss * weight, last=index == len(mine) - 1)
        losses.append(loss.detach())
        tokens += batch.num_real_tokens if part.items else 0
        for key, value in parts.items():
            sums[key] = sums.get(key, 0.0) + value * weight
    names = sorted(sums)
    # What was found is read once, when all of it has been asked for: a GPU is never waited for in between.
    of_parts = _numbers(losses)
    total = sum(loss for loss, part in zip(of_parts, mine, strict=True) if part.items)
    found = _numbers([sums[name] for name in names])
    reduced = [v * world_size() for v in engine.mean([total, float(tokens), *found])]
    if not math.isfinite(reduced[0]):
        suspects = {
            item.name
            for loss, part in zip(of_parts, mine, strict=True)
            for item in part.items
            if not math.isfinite(loss)
        }
        shares = engine.mean([float(item.name in suspects) for item in items])
        _stop_on_nan("the loss", [item for item, share in zip(items, shares, strict=True) if share > 0])
    norm = engine.step(lr)
    if not math.isfinite(norm):
        _stop_on_nan("the gradient", items)
    described = objective.describe(dict(zip(names, reduced[2:], strict=True)))
    return {"loss": reduced[0], **described, "learning_rate": lr, "grad_norm": norm, "tokens": reduced[1]}


def _numbers(values: Sequence[float | Tensor]) -> list[float]:
    """Return values as numbers, those on a device by one transfer."""
    tensors = [value.detach().double() for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]


def _stop_on_nan(what: str, items: Sequence[Item]) -> None:
    shown = ", ".join(item.name for item in items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
    raise UserError(
        f"{what} is no longer finite in an update with the rows {shown}; the last checkpoint is kept. Lower the"
        ' learning rate, check these rows, or use train.precision="float32"'
    )


def _warn_of_decay(first: dict[str, float], now: dict[str, float]) -> None:
    """Warn when something that should not fall has fallen away since the start."""
    limits = {"accuracy": 0.1, "end_of_turn": 0.1, "distinct_answers": 0.3, "p_gold": 1.0}
    for key, limit in limits.items():
        if key not in first or key not in now:
            continue
        scale = abs(first[key]) if key == "distinct_answers" else 1.0
        if now[key] < first[key] - limit * scale:
            logger.warning("warning: dev %s fell from %.3f to %.3f", key, first[key], now[key])


def _watch_best(seen: list[float], now: float | None) -> list[float]:
    """Warn, once each time it happens, when the best responses' log-prob a token has fallen by a nat since the start.

    Keeps the first update's and a running mean: a ranking term may push all responses down.
    """
    if now is None:
        return seen
    if not seen:
        return [now, now]
    first, latest = seen[0], 0.9 * seen[1] + 0.1 * now
    if latest < first - 1.0 <= seen[1]:
        logger.warning("warning: the log-prob of best responses fell from %.3f to %.3f a token", first, latest)
    return [first, latest]
