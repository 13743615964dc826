"""TorchEngine: engine.Engine in plain torch for one process, the reference for everything that DeepSpeed does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coalign.config import TrainTable
from coalign.runs.atomic_files import replace_folder
from coalign.training.checkpoints import read_checkpoint_meta, write_checkpoint_meta


class Wrapper(nn.Module):
    """Carries the network as `module`, as DeepSpeed's engine does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


class TorchEngine:
    """Trains a network in one process, in the dtype that its weights have."""

    def __init__(self, network: nn.Module, train: TrainTable) -> None:
        self.model = Wrapper(network)
        self.train = train
        self.device = torch.device("cpu")
        self.dtype = next(network.parameters()).dtype
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=0.0, betas=(train.beta1, train.beta2), weight_decay=train.weight_decay
        )

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        limit = self.train.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.trained, limit)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def mean(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        def write(target: Path) -> None:
            torch.save([self.model.state_dict(), self.optimizer.state_dict()], target / "weights.pt")
            write_checkpoint_meta(target, state, zero_stage=0)

        replace_folder(folder, write)

    def restore(self, folder: Path) -> dict[str, Any]:
        network, optimizer = torch.load(folder / "weights.pt")
        self.model.load_state_dict(network)
        self.optimizer.load_state_dict(optimizer)
        return read_checkpoint_meta(folder)["state"]
