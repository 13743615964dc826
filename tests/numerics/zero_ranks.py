"""One DeepSpeed rank of test_deepspeed_engine.py: `deepspeed zero_ranks.py SPEC.json` trains every case of the spec."""

from __future__ import annotations

import dataclasses
import gc
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coalign.config import LogTable, ModelTable, TrainTable
from coalign.errors import UserError
from coalign.models import logprobs
from coalign.models.logprobs import Batch
from coalign.training.engine import Engine
from coalign.training.loop import TrainingPlan, train
from coalign.training.losses import RankingForm
from coalign.training.micro_batches import Item
from coalign.training.objectives import Objective, align_objective, sft_objective
from coalign.training.reference import reference_logps
from numerics.tiny import random_ids, random_items

NUM_STEPS = 10
SPOILT = "row20"
SUB_GROUP = 2000  # weights


@dataclasses.dataclass(frozen=True)
class Case:
    """One training run: where, from which model, with which settings."""

    folder: str
    source: str
    loss: str = "sft"
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    lora: bool = False
    dropout: float = 0.0
    noise: int = 0  # where torch's random state begins

    @property
    def path(self) -> Path:
        """Return the folder of this run."""
        return Path(self.folder)

    def model_table(self) -> ModelTable:
        """Return [model]."""
        return ModelTable.model_validate(
            {"lora": {"enabled": self.lora, "rank": 4, "alpha": 8.0, "dropout": self.dropout}}
        )

    def train_table(self) -> TrainTable:
        """Return [train]: several micro-batches per update, a gradient norm above the limit, a checkpoint half way."""
        common = {"precision": "float32", "micro_batch_tokens": 48, "checkpoint_every": 5, "max_grad_norm": 0.5}
        return TrainTable(**{**common, **self.train})


def spoil(objective: Objective) -> Objective:
    """Return an objective with a finite loss whose gradient is NaN in the update that holds the row SPOILT."""

    def loss(logp_N: Tensor, batch: Batch, items: Sequence[Item], denominator: int) -> tuple[Tensor, dict[str, float]]:
        value, parts = objective.loss(logp_N, batch, items, denominator)
        if any(item.name == SPOILT for item in items):
            value = value + (logp_N.sum() * 0).abs().sqrt()
        return value, parts

    return dataclasses.replace(objective, loss=loss)


def run_case(engine: Engine, case: Case) -> None:
    """Train through loop.train, as the recipes do."""
    table = case.train_table()
    items = random_items(NUM_STEPS * 6, seed=1)
    objective: Objective = sft_objective()
    if case.loss in ("sft", "spoilt"):
        source = random.Random(2)
        items = [Item(i.name, i.prompt, (random_ids(source, 1 + n % 7),)) for n, i in enumerate(items)]
        objective = spoil(objective) if case.loss == "spoilt" else objective
    else:
        form = RankingForm(case.loss, beta=0.5, margin=0.1)  # type: ignore[arg-type]
        objective = align_objective(form, table.shared_prefix)
        if case.loss == "dpo":
            items = reference_logps(engine, items, 0, table, case.path / "reference.jsonl")
    # the last update is short: fewer rows than micro-batches
    plan = TrainingPlan(items[: NUM_STEPS * 6 - 5], objective, 6, 1e-3, 0)
    train(engine, plan, table, LogTable(tensorboard=False), case.path)


def in_small_groups(config: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's settings with several sub-groups at stage 3, as a model of billions of weights has them."""
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["sub_group_size"] = SUB_GROUP
    return config


def main(spec: str) -> None:
    """Train every case on this rank and keep the weights."""
    from coalign.process import rank
    from coalign.recipe import exit_with_launcher, set_up_logging
    from coalign.training import deepspeed_engine as engines
    from coalign.training.deepspeed_engine import DeepSpeedEngine, init_ranks

    made = engines.deepspeed_config
    engines.deepspeed_config = lambda *settings: in_small_groups(made(*settings))
    set_up_logging("info")
    exit_with_launcher()
    torch.set_num_threads(1)
    device = init_ranks()
    for values in json.loads(Path(spec).read_text()):
        case = Case(**values)
        torch.manual_seed(case.noise)
        engine = DeepSpeedEngine(case.source, case.model_table(), case.train_table(), device, case.path / "ds.json")
        try:
            run_case(engine, case)
        except UserError as error:
            (case.path / "error.txt").write_text(str(error))
        heads = logprobs._returned_unchanged
        trained = not (case.path / "error.txt").exists()
        assert (heads or not trained) and all(heads.values()), "the head computes log-probs itself"
        state = engine.gather_state()
        if rank() == 0:
            torch.save(state, case.path / "state.pt")
        del engine
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[-1])
