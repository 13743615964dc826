"""What the training loop needs of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


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
