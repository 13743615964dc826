"""What one DeepSpeed rank does for the row "ranks": `deepspeed rank_updates.py SPEC.json` makes updates of stage 1.

Rank 0 writes found.json: the wall seconds of the updates after the first, and the losses of all.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.networks import PAD, Shape
from benchmarks.training_rows import num_tokens
from benchmarks.workloads import sft_items
from coalign.config import ModelTable, TrainTable
from coalign.process import rank
from coalign.recipe import exit_with_launcher, run_step, set_up_logging
from coalign.training.engine import Engine
from coalign.training.loop import _update
from coalign.training.micro_batches import Item
from coalign.training.objectives import sft_objective

LEARNING_RATE = 1e-3


def items_of(spec: dict[str, Any]) -> list[Item]:
    """Return the fewest rows that reach the spec's tokens."""
    shape = Shape(**spec["shape"])
    count = 1
    while num_tokens(items := sft_items(count, shape)) < spec["tokens"]:
        count += 1
    return items


def time_updates(engine: Engine, items: list[Item], updates: int, table: TrainTable) -> dict[str, Any]:
    """Train on the same rows again and again; the first update warms up."""
    losses, start = [], 0.0
    for number in range(1 + updates):
        losses.append(_update(engine, items, sft_objective(), PAD, table, LEARNING_RATE)["loss"])
        start = start if number else time.monotonic()
    return {"seconds": time.monotonic() - start, "losses": losses}


def main(argv: list[str]) -> None:
    """Train on this rank; the last word is the path of what to do."""
    from coalign.training.deepspeed_engine import DeepSpeedEngine, init_ranks

    set_up_logging("warning")
    exit_with_launcher()
    torch.set_num_threads(1)
    device = init_ranks()
    spec = json.loads(Path(argv[-1]).read_text())
    folder, table = Path(spec["folder"]), TrainTable(precision="float32")
    engine = DeepSpeedEngine(str(folder / "model"), ModelTable(), table, device, folder / "deepspeed.json")
    found = time_updates(engine, items_of(spec), spec["updates"], table)
    if rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_step(main)  # a rank leaves as one of a recipe does: at once
