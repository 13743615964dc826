"""The declared form of a ladder's metrics.json: arms as means with their seeds, paired differences, costs.

Every field says its unit and its range; docs/results-format.md is generated from these texts. Knows no model and
computes nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from coalign.evaluation import typed_json
from coalign.evaluation.metrics_schema import Estimate
from coalign.runs.atomic_files import write_json

VERSION = 1
"""Version of the form of a ladder's metrics.json; a file without one counts as version 0."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SeedMean:
    """A metric of an arm over one set of tasks."""

    mean: float | None
    """Mean over tasks of each task's mean over the seeds; null without a task."""
    seeds: tuple[float, ...]
    """Mean over tasks by seed, in the order of `seeds`; empty without a task."""
    num_tasks: int
    """Tasks that the means are over."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArmMetrics:
    """An arm's metrics over one set of tasks, each defined as in SetMetrics."""

    accuracy: SeedMean
    """Accuracy, a share."""
    rouge_l: SeedMean
    """ROUGE-L F, a share."""
    worst_wording: SeedMean
    """Accuracy of the least accurate wording, a share."""
    cr: SeedMean
    """Consistency rate, a share, over the tasks that enter CR."""
    corrected_cr: SeedMean
    """(CR - e) / (1 - e), at most 1, over the tasks that enter CR."""
    mcr: SeedMean
    """Share of wordings in the largest cluster, over the tasks that enter CR."""

    def of(self, metric: str) -> SeedMean:
        """Return a metric by its name."""
        found: SeedMean = getattr(self, metric)
        return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArmSets:
    """An arm's metrics by set of tasks."""

    all: ArmMetrics
    """Over all tasks."""
    seen: ArmMetrics
    """Over the tasks that have inputs in training."""
    unseen: ArmMetrics
    """Over the tasks that are kept out of training."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What steps have used together."""

    updates: tuple[float, ...]
    """Updates of each training step, one after another."""
    tokens_trained: float
    """Tokens of the rows that training steps were given."""
    tokens_generated: float
    """Tokens generated."""
    core_hours: float
    """Wall-clock hours times CPU cores kept busy."""
    wall_seconds: float
    """Wall-clock seconds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """One arm of the experiment."""

    title: str
    """What the table calls it."""
    settings: dict[str, str]
    """Settings beyond the common config, by table.key, as TOML."""
    metrics: ArmSets
    """Its metrics by set of tasks."""
    cost: Cost
    """What one seed of it costs, the mean over the seeds, as if the arm stood alone; evaluation left out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArmDifference:
    """A paired difference b - a of two arms in one metric. The keys of its estimate stand beside `a` and `b`."""

    a: str
    """The arm that is subtracted."""
    b: str
    """The other arm."""
    what: str
    """What the difference shows."""
    metric: str
    """Name of a field of ArmMetrics."""
    estimate: Estimate = dataclasses.field(metadata=typed_json.FLAT)
    """Mean over tasks of the paired differences, each task's mean over the seeds first; its interval is over tasks."""
    seeds: tuple[float, ...]
    """The difference by seed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SetDifferences:
    """Paired differences by set of tasks, by pair of arms, then by metric."""

    all: tuple[ArmDifference, ...]
    """Over all tasks."""
    seen: tuple[ArmDifference, ...]
    """Over seen tasks."""
    unseen: tuple[ArmDifference, ...]
    """Over unseen tasks."""

    def over(self, which: str) -> tuple[ArmDifference, ...]:
        """Return the differences over one of TASK_SETS."""
        found: tuple[ArmDifference, ...] = getattr(self, which)
        return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TotalCost:
    """What the whole experiment has used, all seeds, shared steps once."""

    together: Cost
    """All steps."""
    eval: Cost
    """The eval steps among them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LadderResult:
    """The content of a ladder's metrics.json."""

    name: str
    """Name of the experiment's folder."""
    seeds: tuple[int, ...]
    """The seeds, in the order of every list by seed."""
    arms: dict[str, ArmResult]
    """By arm, in the order of the table."""
    differences: SetDifferences
    """Paired differences of the comparisons among these arms."""
    cost: TotalCost
    """What the experiment has used."""
    num_tasks: int
    """Tasks that every seed has."""
    num_seen_tasks: int
    """Those of them with inputs in training."""
    num_tasks_in_cr: int
    """Those with an input that enters CR in every seed."""
    tasks_left_out: tuple[str, ...]
    """Tasks that some seed lacks."""
    num_bootstrap: int
    """Resamples of the bootstrap (eval.num_bootstrap)."""
    split: str
    """Split of inputs and wordings (eval.split)."""
    agreement: str
    """When two answers agree (eval.agreement)."""


def write_result(folder: Path, result: LadderResult) -> None:
    """Write metrics.json into a ladder's folder."""
    write_json(folder / "metrics.json", typed_json.with_version(result, VERSION))


def from_json(content: dict[str, Any], file: str = "metrics.json") -> LadderResult:
    """Return a result from the content of a file. Raises UserError as evaluation/metrics_file.from_json."""
    return typed_json.read_version(LadderResult, content, VERSION, file)
