"""One result out of several seeds' evaluations: arms as means with their seeds as points, and paired differences.

A task's number is its mean over the seeds first; intervals are then over tasks (and their
inputs) by the rule of intervals.py, so that seeds are never pooled as if they were inputs. Knows no model.

Shape suffixes: S seeds, T tasks, I inputs, W wordings, B weightings, M columns (arms times metrics).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from coalign.config import EvalTable
from coalign.evaluation.grids import EXTREMES
from coalign.evaluation.intervals import MIN_TASKS_BOOTSTRAP, TaskSample, estimate, two_level_bootstrap
from coalign.evaluation.metrics import BoolArray, FloatArray
from coalign.evaluation.metrics_schema import TASK_SETS
from coalign.evaluation.scores import CR_METRICS, TaskScores, read_scores, seed_values
from coalign.experiment.arms import ARMS
from coalign.experiment.ladder import Ladder, StepRun
from coalign.experiment.ladder_result import (
    ArmDifference,
    ArmMetrics,
    ArmResult,
    ArmSets,
    Cost,
    LadderResult,
    SeedMean,
    SetDifferences,
    TotalCost,
)
from coalign.runs.costs import cost_rows
from coalign.runs.step_folder import read_manifest

ANSWER_METRICS = ("accuracy", "rouge_l", "worst_wording")
DIFFERENCE_ORDER = ("accuracy", *CR_METRICS, "worst_wording", "rouge_l")


def task_sample(task: TaskScores, columns: Sequence[tuple[str, str]], inputs_I: BoolArray) -> TaskSample:
    """Return the columns (arm, metric) of a task, each the mean over seeds, as a statistic of its inputs' weights."""
    chosen = np.flatnonzero(inputs_I)

    def statistic(weights_BJ: FloatArray) -> FloatArray:
        weights_BI = np.zeros((len(weights_BJ), task.num_inputs))
        weights_BI[:, chosen] = weights_BJ
        values = [[seed_values(s, arm, metric, weights_BI) for s in task.seeds] for arm, metric in columns]
        known_MSB = np.array(values)
        means_MB: FloatArray = np.nanmean(known_MSB, axis=1)
        return means_MB.T

    return TaskSample(len(chosen), statistic)


def points(tasks: Sequence[TaskScores], arm: str, metric: str, seed: int) -> list[float]:
    """Return one seed's number for each task, every input counted once."""
    return [
        float(seed_values(t.seeds[seed], arm, metric, np.full((1, t.num_inputs), 1.0 / t.num_inputs))[0]) for t in tasks
    ]


def set_members(tasks: Sequence[TaskScores]) -> dict[str, list[int]]:
    """Return the indices of all, seen and unseen tasks."""
    seen = {index for index, task in enumerate(tasks) if task.seen}
    every = range(len(tasks))
    return {"all": [*every], "seen": [i for i in every if i in seen], "unseen": [i for i in every if i not in seen]}


@dataclasses.dataclass(frozen=True, slots=True)
class MetricGroup:
    """Metrics that are over the same tasks: their points, and the resamples of the sets that are large enough."""

    metrics: tuple[str, ...]
    columns: dict[tuple[str, str], int]  # of (arm, metric)
    sets: dict[str, list[int]]
    points_TM: FloatArray
    drawn: dict[str, FloatArray]
    of_seeds: dict[tuple[str, str, str], tuple[float, ...]]  # of (set, arm, metric): each seed's mean over tasks

    def mean(self, which: str, arm: str, metric: str) -> SeedMean:
        """Return an arm's metric over a set of tasks."""
        members = self.sets[which]
        mean = estimate(self.points_TM[members, self.columns[arm, metric]]).mean
        return SeedMean(mean=mean, seeds=self.of_seeds[which, arm, metric], num_tasks=len(members))

    def difference(self, which: str, pair: tuple[str, str, str], metric: str) -> ArmDifference:
        """Return the paired difference b - a of two arms over a set of tasks."""
        b, a, what = pair
        members = self.sets[which]
        i, j = self.columns[b, metric], self.columns[a, metric]
        # A minimum over wordings is lower in a resample of few inputs: its interval is over tasks alone.
        resampled = which in self.drawn and metric not in EXTREMES
        moved = self.drawn[which][:, i] - self.drawn[which][:, j] if resampled else None
        found = estimate(self.points_TM[members, i] - self.points_TM[members, j], moved)
        pairs = zip(self.of_seeds[which, b, metric], self.of_seeds[which, a, metric], strict=True)
        each = tuple(x - y for x, y in pairs)
        return ArmDifference(a=a, b=b, what=what, metric=metric, estimate=found, seeds=each)


def metric_group(
    tasks: Sequence[TaskScores], arms: Sequence[str], metrics: tuple[str, ...], num_resamples: int, seed: int
) -> MetricGroup:
    """Return a group of metrics over the tasks that have inputs for them, resampled where there are enough tasks."""
    inputs = [task.in_cr() if metrics is CR_METRICS else np.ones(task.num_inputs, bool) for task in tasks]
    chosen = [(task, inputs_I) for task, inputs_I in zip(tasks, inputs, strict=True) if inputs_I.any()]
    group_tasks = [task for task, _ in chosen]
    columns = [(arm, metric) for arm in arms for metric in metrics]
    samples = [task_sample(task, columns, inputs_I) for task, inputs_I in chosen]
    sets = set_members(group_tasks)
    large = {which: members for which, members in sets.items() if len(members) >= MIN_TASKS_BOOTSTRAP}
    drawn = dict(zip(large, two_level_bootstrap(samples, [*large.values()], num_resamples, seed), strict=True))
    points_TM = np.array([sample.point() for sample in samples]).reshape(len(samples), len(columns))
    of_seeds = {
        (which, *pair): _seed_means([group_tasks[i] for i in members], *pair)
        for which, members in sets.items()
        for pair in columns
    }
    return MetricGroup(metrics, {pair: i for i, pair in enumerate(columns)}, sets, points_TM, drawn, of_seeds)


def _seed_means(tasks: Sequence[TaskScores], arm: str, metric: str) -> tuple[float, ...]:
    if not tasks:
        return ()
    return tuple(float(np.mean(points(tasks, arm, metric, seed))) for seed in range(len(tasks[0].seeds)))


def aggregate(
    tasks: Sequence[TaskScores],
    arms: Sequence[str],
    comparisons: Iterable[tuple[str, str, str]],
    num_resamples: int,
    seed: int,
) -> tuple[dict[str, ArmSets], SetDifferences]:
    """Return every arm's metrics, and the paired differences b - a of the comparisons (b, a, what) among these arms."""
    pairs = [(b, a, what) for b, a, what in comparisons if {a, b} <= {*arms}]
    groups = [metric_group(tasks, arms, metrics, num_resamples, seed) for metrics in (ANSWER_METRICS, CR_METRICS)]
    of_arms = {arm: ArmSets(**{which: _arm_metrics(groups, which, arm) for which in TASK_SETS}) for arm in arms}
    return of_arms, SetDifferences(**{which: _differences(groups, which, pairs) for which in TASK_SETS})


def _arm_metrics(groups: Sequence[MetricGroup], which: str, arm: str) -> ArmMetrics:
    means = {metric: group.mean(which, arm, metric) for group in groups for metric in group.metrics}
    return ArmMetrics(**means)


def _differences(
    groups: Sequence[MetricGroup], which: str, pairs: Sequence[tuple[str, str, str]]
) -> tuple[ArmDifference, ...]:
    found = {metric: group for group in groups for metric in group.metrics}
    return tuple(found[metric].difference(which, pair, metric) for pair in pairs for metric in DIFFERENCE_ORDER)


def cost_of(folders: Iterable[Path]) -> Cost:
    """Return what steps have used together; `updates` lists every training's own number."""
    rows = cost_rows({str(folder): folder for folder in folders})
    missing = [str(folder) for folder in folders if read_manifest(folder) is None]
    assert not missing, f"incomplete: {missing}"
    return Cost(
        updates=tuple(row.updates for row in rows if row.updates),
        tokens_trained=sum(row.tokens_trained or 0 for row in rows),
        tokens_generated=sum(row.tokens_generated or 0 for row in rows),
        core_hours=sum(row.core_hours or 0.0 for row in rows),
        wall_seconds=sum(row.wall_seconds or 0.0 for row in rows),
    )


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """Return the mean of several seeds' costs."""
    return Cost(
        updates=tuple(float(np.mean(numbers)) for numbers in zip(*(cost.updates for cost in costs), strict=True)),
        tokens_trained=float(np.mean([cost.tokens_trained for cost in costs])),
        tokens_generated=float(np.mean([cost.tokens_generated for cost in costs])),
        core_hours=float(np.mean([cost.core_hours for cost in costs])),
        wall_seconds=float(np.mean([cost.wall_seconds for cost in costs])),
    )


def make_result(
    ladder: Ladder, steps: Sequence[StepRun], comparisons: Iterable[tuple[str, str, str]], table: EvalTable, seed: int
) -> LadderResult:
    """Return everything that the table and the figure show, the content of the ladder's metrics.json."""
    tasks, left_out = read_scores([ladder.eval_folder(n) for n in ladder.seeds], [ladder.arms] * len(ladder.seeds))
    of_arms, differences = aggregate(tasks, ladder.arms, comparisons, table.num_bootstrap, seed)
    evals = [run.folder for run in steps if run.step == "eval"]
    return LadderResult(
        name=ladder.home.name,
        seeds=ladder.seeds,
        arms={name: _arm_result(ladder, steps, name, of_arms[name]) for name in ladder.arms},
        differences=differences,
        cost=TotalCost(together=cost_of([run.folder for run in steps]), eval=cost_of(evals)),
        num_tasks=len(tasks),
        num_seen_tasks=sum(task.seen for task in tasks),
        num_tasks_in_cr=sum(bool(task.in_cr().any()) for task in tasks),
        tasks_left_out=tuple(left_out),
        num_bootstrap=table.num_bootstrap,
        split=table.split,
        agreement=table.agreement,
    )


def _arm_result(ladder: Ladder, steps: Sequence[StepRun], name: str, metrics: ArmSets) -> ArmResult:
    alone = [[ladder.folder(place, number) for place in ladder.made_from(name)] for number in ladder.seeds]
    cost = mean_cost([cost_of(folders) for folders in alone])
    own = [run for run in steps if run.arm == name and run.seed == ladder.seeds[0]]
    settings = own[-1].arm_settings() if own else {}
    return ArmResult(title=ARMS[name].title, settings=settings, metrics=metrics, cost=cost)
