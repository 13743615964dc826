"""The training loop of both stages: updates by micro-batches, schedule, dev measurement, checkpoints, the log.

Knows the Engine protocol, no DeepSpeed, and neither stage by name: a stage is its items and its objective.
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
from coalign.process import Preemption, derive_seed, rank, world_size
from coalign.training.checkpoints import resume, save
from coalign.training.engine import Engine
from coalign.training.micro_batches import Item, batch_of, micro_batches, pack_budget
from coalign.training.objectives import Objective
from coalign.training.token_files import as_rows
from coalign.training.training_log import TrainingLog

logger = logging.getLogger("coalign")


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """A whole training run: items in the order they are trained on, `batch_items` per update, and their objective.

    `learning_rate` is the highest of the schedule. `seed` decides the dropout of adapters.
    """

    items: Sequence[Item]
    objective: Objective
    batch_items: int
    learning_rate: float
    pad_id: int
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """Return the number of updates; the last may be short."""
        return math.ceil(len(self.items) / self.batch_items)

    @property
    def num_tokens(self) -> int:
        """Return the tokens that enter the model over the whole run, each group's prompt counted once."""
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
    settings: TrainTable,
    log: LogTable,
    folder: Path,
    measure: Callable[[], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Run or resume a training run and return its totals: {"updates", "tokens"}.

    Resumes at the newest whole checkpoint in `folder`, made by any number of ranks. `measure` is the dev measurement.
    Raises UserError when the loss or the gradient is no longer finite; it names the rows of that update. Raises
    SystemExit after SIGUSR1 or SIGTERM, once a checkpoint is written.
    """
    preemption = Preemption()
    preemption.install()
    state = resume(engine, folder)
    writer = TrainingLog(folder, log, state.step)
    if state.step == 0 and measure and settings.eval_every:
        state.first_measure = measure()
        writer.write({"kind": "dev", "step": 0, **state.first_measure})
    while state.step < plan.num_steps:
        started = time.monotonic()
        items = plan.items[state.step * plan.batch_items : (state.step + 1) * plan.batch_items]
        lr = learning_rate_at(state.step, plan.num_steps, plan.learning_rate, settings)
        # Dropout depends on the update alone, so that a resumed run repeats an undisturbed one.
        torch.manual_seed(derive_seed(plan.seed, "update", state.step, rank()))
        line = _update(engine, items, plan.objective, plan.pad_id, settings, lr)
        state.step += 1
        state.tokens += line["tokens"]
        state.p_best = _watch_best(state.p_best, line.get("p_best"))
        speed = line["tokens"] / (time.monotonic() - started)
        writer.write({"kind": "train", "step": state.step, **line, "tokens_per_second": speed}, plan.num_steps)
        last = state.step == plan.num_steps
        if measure and settings.eval_every and (state.step % settings.eval_every == 0 or last):
            measured = measure()
            writer.write({"kind": "dev", "step": state.step, **measured})
            if state.first_measure:
                _warn_of_decay(state.first_measure, measured)
        stop = engine.mean([float(preemption.requested())])[0] > 0 and not last
        # A checkpoint after the last update too: when the export fails or is killed, training need not be repeated.
        due = settings.checkpoint_every and (state.step % settings.checkpoint_every == 0 or last)
        if due or stop:
            save(engine, folder, state, settings.keep_last)
        if stop:
            writer.close()
            raise SystemExit(f"stopped by a signal after update {state.step}; run the same command again to go on")
    writer.close()
    preemption.remove()
    return {"updates": state.step, "tokens": int(state.tokens)}


def _update(
    engine: Engine, items: Sequence[Item], objective: Objective, pad_id: int, settings: TrainTable, lr: float
) -> dict[str, float]:
    """Make one update and return its log line; how items are split over micro-batches and ranks changes no loss."""
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
    # Results are read only here, after all work has been queued, so that the GPU never idles in between.
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
    """Return values as numbers; those on a device come in one transfer."""
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
    """Warn when a dev number has fallen too far below that before the first update."""
    limits = {"accuracy": 0.1, "end_of_turn": 0.1, "distinct_answers": 0.3, "p_gold": 1.0}
    for key, limit in limits.items():
        if key not in first or key not in now:
            continue
        scale = abs(first[key]) if key == "distinct_answers" else 1.0
        if now[key] < first[key] - limit * scale:
            logger.warning("warning: dev %s fell from %.3f to %.3f", key, first[key], now[key])


def _watch_best(seen: list[float], now: float | None) -> list[float]:
    """Warn when the best responses' log-prob per token falls a nat below its start: a ranking term may lower them all.

    `seen` and the result hold the first update's value and a running mean. The warning comes once per crossing.
    """
    if now is None:
        return seen
    if not seen:
        return [now, now]
    first, latest = seen[0], 0.9 * seen[1] + 0.1 * now
    if latest < first - 1.0 <= seen[1]:
        logger.warning("warning: the log-prob of best responses fell from %.3f to %.3f per token", first, latest)
    return [first, latest]
