"""[train], [sft] and [align]: what both training stages share, and what is each one's own.

config.py hands them on. Knows neither files nor torch.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from coalign.errors import UserError
from coalign.tables import (
    MAX_COUNT,
    FilePath,
    NonNegative,
    NonNegativeNumber,
    Positive,
    PositiveNumber,
    Share,
    Table,
)
from coalign.tables import key as _field

MAX_DRAWN, MAX_PASSES = 1_000_000, 1000  # rows of a training that is surely no mistake, or passes over its data


class TrainTable(Table):
    """[train]: what both training stages share."""

    precision: Literal["auto", "float32", "bfloat16"] = _field("auto", "auto: bfloat16 on GPU, float32 on CPU")
    zero_stage: Literal[0, 1, 2, 3] = _field(2, "DeepSpeed ZeRO stage")
    offload_optimizer: bool = _field(False, "keep optimizer states in CPU memory")
    offload_parameters: bool = _field(False, "keep parameters in CPU memory (ZeRO 3)")
    gradient_checkpointing: bool = _field(False, "recompute activations in the backward pass")
    shared_prefix: bool = _field(True, "compute a group's prompt once for all its responses (align)")
    max_grad_norm: NonNegativeNumber = _field(1.0, "clip the gradient to this norm (0: off)")
    weight_decay: NonNegativeNumber = _field(0.0, "AdamW weight decay")
    beta1: Annotated[float, Field(ge=0, lt=1)] = _field(0.9, "AdamW beta 1")
    beta2: Annotated[float, Field(ge=0, lt=1)] = _field(0.999, "AdamW beta 2")
    schedule: Literal["constant", "linear", "cosine"] = _field("cosine", "learning rate after the warm-up")
    warmup_share: Share = _field(0.05, "share of the updates with rising learning rate")
    final_lr_share: Share = _field(0.1, "share of the highest learning rate that linear and cosine fall towards")
    micro_batch_tokens: Positive = _field(
        8192,
        "padded tokens that a rank computes at once; an update accumulates as many micro-batches as it needs",
        neutral=True,
    )
    pack_tokens: Annotated[int, Field(ge=-1, le=MAX_COUNT)] = _field(
        -1,
        "tokens per row that several items share without attending to one another (0: no packing; -1: by device)",
        neutral=True,
    )
    eval_every: NonNegative = _field(50, "updates between dev measurements (0: never)", neutral=True)
    dev_inputs: NonNegative = _field(32, "dev inputs of the small consistency measure", neutral=True)
    dev_wordings: Annotated[int, Field(ge=2, le=MAX_COUNT)] = _field(
        4, "dev wordings of the small consistency measure", neutral=True
    )
    dev_max_new_tokens: Positive = _field(32, "tokens per answer of the small consistency measure", neutral=True)
    checkpoint_every: NonNegative = _field(
        100, "updates between checkpoints (0: only when asked to stop)", neutral=True
    )
    keep_last: Positive = _field(2, "checkpoints to keep", neutral=True)
    ray_ranks: NonNegative = _field(
        0, "ranks that launch/ray_job.py places on a cluster (0: one per GPU; without GPUs one per node)", neutral=True
    )
    ray_cpus_per_rank: Positive = _field(1, "CPUs that Ray reserves per rank", neutral=True)

    @model_validator(mode="after")
    def _check(self) -> TrainTable:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"train.offload_parameters needs train.zero_stage=3, not {self.zero_stage}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("train.offload_optimizer needs train.zero_stage=1, 2 or 3, not 0")
        return self


class StageTable(Table):
    """What [sft] and [align] have in common."""

    learning_rate: Annotated[float, Field(gt=0)] = _field(2e-5, "highest learning rate")
    epochs: NonNegativeNumber = _field(0.0, "passes over the rows (0: max_steps counts)")
    max_steps: NonNegative = _field(0, "updates (0: epochs count)")

    @model_validator(mode="before")
    @classmethod
    def _steps_alone(cls, values: Any) -> Any:
        """Let max_steps given alone replace the default epochs."""
        if isinstance(values, dict) and values.get("max_steps") and "epochs" not in values:
            return {**values, "epochs": 0.0}
        return values

    @model_validator(mode="after")
    def _check(self) -> StageTable:
        name = type(self).__name__.removesuffix("Table").lower()
        if bool(self.epochs) == bool(self.max_steps):
            raise ValueError(
                f"{name}.epochs={self.epochs:g} and {name}.max_steps={self.max_steps}: set exactly one of them"
            )
        return self

    def num_drawn(self, items: int, batch: int) -> int:
        """Return how many rows or groups are trained on in updates of `batch` of them, repeated ones counted again."""
        return self.max_steps * batch or math.ceil(self.epochs * items)

    def require_end(self, items: int, batch: int) -> None:
        """Raise UserError for so many rows or groups in all that encoding and training them would not end."""
        drawn = self.num_drawn(items, batch)
        if drawn > max(MAX_DRAWN, MAX_PASSES * items):
            name = type(self).__name__.removesuffix("Table").lower()
            length = f"max_steps={self.max_steps} x {batch:,}" if self.max_steps else f"epochs={self.epochs:g}"
            raise UserError(
                f"{name}.{length} asks for {drawn:,} rows or groups, that is {drawn / max(1, items):,.0f} passes over"
                f" the {items:,} there are; ask for fewer than {MAX_PASSES:,} passes"
            )


class SftTable(StageTable):
    """[sft]: stage 1, fine-tuning on paraphrased instructions."""

    wordings: Literal["original", "augmented"] = _field(
        "augmented", "original: the plain SFT arm, with as many updates"
    )
    split: Literal["sft", "align"] = _field("sft", "whose gold answers are trained on (align: a control arm)")
    epochs: NonNegativeNumber = _field(3.0, "passes over the inputs (0: max_steps counts)")
    batch_rows: Positive = _field(32, "rows per update, over all ranks")
    replay: FilePath = _field("", "JSONL (instruction, input, output) of other skills to mix in")
    replay_share: Share = _field(0.0, "share of every update's rows that come from sft.replay")

    @model_validator(mode="after")
    def _check_replay(self) -> SftTable:
        if bool(self.replay) != (self.replay_share > 0) or self.replay_share >= 1:
            raise ValueError(
                f"sft.replay={self.replay!r} with sft.replay_share={self.replay_share:g}: give both, share under 1"
            )
        return self


class AlignTable(StageTable):
    """[align]: stage 2, consistency alignment training."""

    epochs: NonNegativeNumber = _field(1.0, "passes over the groups (0: max_steps counts)")
    learning_rate: Annotated[float, Field(gt=0)] = _field(1e-5, "highest learning rate")
    batch_groups: Positive = _field(16, "groups per update, over all ranks")
    loss: Literal["hinge", "logistic", "dpo"] = _field("hinge", "form of the ranking term")
    rank_weight: NonNegativeNumber = _field(1.0, "lambda, weight of the ranking term")
    margin: NonNegativeNumber = _field(0.0, "margin of the hinge, in nats per token")
    beta: PositiveNumber = _field(1.0, "sharpness of logistic and dpo")
