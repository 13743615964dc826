"""The Engine protocol: what the training loop needs of an engine, all of it called by every rank in step.

Implemented by deepspeed_engine, and in plain torch by the tests. Knows no batches, losses or stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Engine(Protocol):
    """Trains one model over all ranks; `dtype` is that of its weights, `device` this rank's."""

    device: torch.device
    dtype: torch.dtype

    @property
    def model(self) -> Any:
        """Return what to call for a forward pass."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of this rank's share of the global loss, a sum over ranks and micro-batches.

        `last` marks the last micro-batch of an update.
        """

    def step(self, learning_rate: float) -> float:
        """Update the weights and return the gradient norm before clipping."""

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return each value averaged over the ranks."""

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint folder that appears once it is whole; `state` is the loop's, as JSON values."""

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint, made by any number of ranks, and return the state saved with it."""
