"""The training loop of both stages: micro-batches, schedule, dev measurement, checkpoints, what is logged.

Used by launch/sft.py and launch/align.py. Knows only the Engine protocol declared here, no DeepSpeed, and no stage:
a stage is its items and its objective.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from coalign.artifacts import digest_file, write_rows
from coalign.attention import sliding_window
from coalign.batching import Item, MicroBatch, collate, micro_batches, row_tokens
from coalign.config import LogTable, TrainTable
from coalign.errors import UserError
from coalign.logprobs import Batch, evaluation_mode, sum_by_response, to_device, token_logps
from coalign.objectives import Objective
from coalign.process import Preemption, rank, world_size
from coalign.records import read_rows
from coalign.training_log import TrainingLog

logger = logging.getLogger("coalign")

CHECKPOINT_META = "checkpoint.json"


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

    Compares log-probs of the largest group both ways, on the live model; called by every rank.
    """
    item = max(items, key=lambda i: (len(i.responses), len(i.prompt), i.name))
    _compare_layouts(engine, [item], pad_id, True, max(item.longest() for item in items))


def check_packing(engine: Engine, items: Sequence[Item], pad_id: int) -> None:
    """Raise UserError when the model does not compute rows that items share as it computes separate ones.

    Compares log-probs of the longest and the shortest item both ways, on the live model; called by every rank.
    """
    ordered = sorted(items, key=lambda i: (i.longest(), i.name))
    _compare_layouts(engine, [ordered[-1], ordered[0]], pad_id, False, ordered[-1].longest())


def _compare_layouts(engine: Engine, items: Sequence[Item], pad_id: int, shared_prefix: bool, longest: int) -> None:
    """Raise UserError when log-probs of items in one row differ from those of one row a response."""
    what, key = ("shared-prefix groups", "shared_prefix=false") if shared_prefix else ("packed rows", "pack_tokens=0")
    window, in_all_layers = sliding_window(engine.model.module.config)
    if window and not in_all_layers and longest > window:
        raise UserError(
            f"{what} of up to {longest} tokens exceed the sliding window of {window} that some of the model's layers"
            f" have; set train.{key}"
        )
    found = []
    for together in (True, False):
        share = [len(items)] if together else None
        batch = collate(items, pad_id, shared_prefix and together, engine.dtype, share, window)
        try:
            with torch.no_grad(), evaluation_mode(engine.model):
                found.append(token_logps(engine.model, to_device(batch, engine.device)))
        except (TypeError, ValueError, IndexError) as error:
            if not together:
                raise
            raise UserError(
                f"this model does not take the attention mask of {what} ({error}); set train.{key}"
            ) from error
    difference = float((found[0] - found[1]).abs().max())
    if not difference <= (1e-3 if engine.dtype is torch.float32 else 0.5):
        raise UserError(
            f"this model does not compute {what} exactly (log-probs differ by {difference:.2g}); set train.{key}"
        )


def reference_logps(engine: Engine, items: Sequence[Item], pad_id: int, settings: TrainTable, path: Path) -> list[Item]:
    """Return the items with the starting model's summed log-probs as DPO's reference, stored in `path`.

    Called by every rank before the first update; a stored file is read instead.
    """
    if not path.exists():
        found = _all_logps(engine, items, pad_id, settings)
        if rank() == 0:
            write_rows(
                path, ({"name": item.name, "logps": list(logps)} for item, logps in zip(items, found, strict=True))
            )
        engine.mean([0.0])  # the others wait until the file is there
    stored = {row["name"]: tuple(row["logps"]) for _, row in read_rows(path)}
    return [dataclasses.replace(item, reference=stored[item.name]) for item in items]


def _all_logps(engine: Engine, items: Sequence[Item], pad_id: int, settings: TrainTable) -> list[tuple[float, ...]]:
    offsets = list(itertools.accumulate((len(item.responses) for item in items), initial=0))
    flat = [0.0] * offsets[-1]
    position = {item.name: offset for item, offset in zip(items, offsets, strict=False)}
    for start in range(0, len(items), 256):  # some at a time: micro-batches of like length, all ranks in step
        dealt = micro_batches(
            items[start : start + 256], settings.micro_batch_tokens, world_size(), settings.shared_prefix
        )
        for part in dealt[rank()]:
            batch, _ = _batch_of(engine, part, items[0], pad_id, settings.shared_prefix)
            with torch.no_grad(), evaluation_mode(engine.model):
                logp_R = sum_by_response(token_logps(engine.model, batch), batch).tolist()
            values = iter(logp_R)
            for item in part.items:
                for k in range(len(item.responses)):
                    flat[position[item.name] + k] = next(values)
    total = [v * world_size() for v in engine.mean(flat)]
    return [tuple(total[a:b]) for a, b in itertools.pairwise(offsets)]


@dataclasses.dataclass(frozen=True)
class Plan:
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
        return sum(row_tokens(item, shared_prefix=True)[0] for item in self.items)


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
    plan: Plan,
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
    pack_tokens = settings.pack_tokens if objective.packed else 0
    dealt = micro_batches(items, settings.micro_batch_tokens, world_size(), objective.shared_prefix, pack_tokens)
    mine = dealt[rank()]
    sums: dict[str, float] = {}
    suspects: set[str] = set()  # rows of a micro-batch whose loss is not finite
    total = tokens = 0.0
    for index, part in enumerate(mine):
        batch, rows = _batch_of(engine, part, items[0], pad_id, objective.shared_prefix)
        loss, parts = objective.loss(token_logps(engine.model, batch), batch, rows, denominator)
        weight = 1.0 if part.items else 0.0
        engine.backward(loss * weight, last=index == len(mine) - 1)
        total += float(loss.detach()) * weight
        if not math.isfinite(float(loss.detach())):
            suspects |= {item.name for item in rows}
        tokens += batch.num_real_tokens * weight
        for key, value in parts.items():
            sums[key] = sums.get(key, 0.0) + value * weight
    names = sorted(sums)
    reduced = [v * world_size() for v in engine.mean([total, tokens, *(sums[n] for n in names)])]
    if not math.isfinite(reduced[0]):
        found = engine.mean([float(item.name in suspects) for item in items])
        _stop_on_nan("the loss", [item for item, share in zip(items, found, strict=True) if share > 0])
    norm = engine.step(lr)
    if not math.isfinite(norm):
        _stop_on_nan("the gradient", items)
    described = objective.describe(dict(zip(names, reduced[2:], strict=True)))
    return {"loss": reduced[0], **described, "learning_rate": lr, "grad_norm": norm, "tokens": reduced[1]}


def _batch_of(
    engine: Engine, part: MicroBatch, filler: Item, pad_id: int, shared_prefix: bool
) -> tuple[Batch, tuple[Item, ...]]:
    """Return a micro-batch on the device and its items; where nothing is left, `filler` for the collectives' sake."""
    items = part.items or (filler,)
    window, _ = sliding_window(engine.model.module.config)
    batch = collate(items, pad_id, shared_prefix, engine.dtype, part.items_per_row, window)
    return to_device(batch, engine.device), items


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


def _resume(engine: Engine, folder: Path) -> dict[str, Any]:
    """Load the newest checkpoint whose files are all whole and return its state; say which were passed over."""
    for checkpoint in sorted((folder / "checkpoints").glob("step_*"), reverse=True):
        complaint = _complaint(checkpoint)
        if engine.mean([float(complaint is not None)])[0] > 0:
            logger.warning("checkpoint %s is passed over: %s", checkpoint, complaint or "not whole on another rank")
            continue
        state = engine.restore(checkpoint)
        logger.info("resuming after update %d from %s", state["step"], checkpoint)
        return state
    return {"step": 0, "tokens": 0.0, "first_measure": None, "p_best": []}


def _complaint(checkpoint: Path) -> str | None:
    try:
        meta = json.loads((checkpoint / CHECKPOINT_META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{CHECKPOINT_META} is missing or cut short"
    if rank() != 0:
        return None  # one reader is enough to digest the files
    for name, digest in meta["files"].items():
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if digest_file(path) != digest:
            return f"{name} is damaged"
    return None


def _rotate(newest: Path, keep_last: int) -> None:
    """Remove all but the newest checkpoints; called after `newest` was written and digested.

    What lies beyond it was passed over as damaged, and is removed too.
    """
    if rank() == 0:
        found = sorted(newest.parent.glob("step_*"))
        kept = [path for path in found if path.name <= newest.name][-keep_last:]
        for old in found:
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)
