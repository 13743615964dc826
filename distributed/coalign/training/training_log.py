"""What a training step logs while it runs.

Knows neither engine nor model.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from coalign.config import LogTable
from coalign.errors import UserError
from coalign.process import rank
from coalign.runs.atomic_files import write_atomic

logger = logging.getLogger("coalign")


class TrainingLog:
    """metrics.jsonl, the printed line, TensorBoard and, when asked for, Weights & Biases; rank 0 only."""

    def __init__(self, folder: Path, table: LogTable, step: int) -> None:
        """Open the log in a step's folder, to continue after update `step`; later lines are removed.

        Raises UserError when log.wandb is set and wandb is not installed.
        """
        self.table = table
        self.active = rank() == 0
        self.tensorboard: Any = None
        self.wandb: Any = None
        if not self.active:
            return
        self.path = folder / "metrics.jsonl"
        self._cut_after(step)
        self.stream = self.path.open("a", encoding="utf-8")
        if table.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if table.wandb:
            self.wandb = _start_wandb(folder, step)

    def _cut_after(self, step: int) -> None:
        """Remove lines after the checkpoint, whose updates are repeated, and lines that are cut short or damaged."""
        lines = self.path.read_bytes().splitlines(keepends=True) if step and self.path.is_file() else []
        kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
        write_atomic(self.path, b"".join(kept).decode("utf-8"))

    def write(self, row: dict[str, Any], num_steps: int = 0) -> None:
        """Write a row with `kind` ("train" or "dev"), `step` and numbers; print it every log.every updates."""
        if not self.active:
            return
        self.stream.write(json.dumps(row) + "\n")
        self.stream.flush()
        numbers = {k: v for k, v in row.items() if k not in ("kind", "step")}
        if self.tensorboard is not None:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(f"{row['kind']}/{key}", value, row["step"])
        if self.wandb is not None:
            self.wandb.log({f"{row['kind']}/{k}": v for k, v in numbers.items()}, step=row["step"])
        if row["kind"] == "dev" or row["step"] % self.table.every == 0 or row["step"] in (1, num_steps):
            total = f"/{num_steps}" if num_steps else ""
            shown = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
            logger.info("%s %d%s  %s", "update" if row["kind"] == "train" else "dev at", row["step"], total, shown)

    def close(self) -> None:
        """Close the file and the loggers."""
        if self.active:
            self.stream.close()
            if self.tensorboard is not None:
                self.tensorboard.close()
            if self.wandb is not None:
                self.wandb.finish()


def _start_wandb(folder: Path, step: int) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("log.wandb=true, but wandb is not installed; pip install wandb, or set it to false") from error
    return wandb.init(project="coalign", name=f"{folder.parent.name}-{folder.name}", dir=str(folder), resume="allow")


def _step_of(line: bytes) -> float:
    """Return the update that a line is about, infinity for a damaged line."""
    try:
        step = json.loads(line.decode("utf-8"))["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if type(step) in (int, float) else math.inf
