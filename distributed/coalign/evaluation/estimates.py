"""Means over tasks with intervals, of every model and metric, and the paired differences of models.

Knows columns of numbers and sets of tasks; no answer and no file.

Shape suffixes: T tasks, M columns (models times metrics).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from coalign.evaluation.grids import ANSWERS, CONSISTENCY, EXTREMES, answer_sample, consistency_sample
from coalign.evaluation.intervals import MIN_TASKS_BOOTSTRAP, SHARE, TaskSample, estimate, two_level_bootstrap
from coalign.evaluation.metrics_schema import TASK_SETS, Difference, Estimate, SetMetrics
from coalign.evaluation.result_rows import Results
from coalign.process import derive_seed

COMPARED = ("cr", "corrected_cr", "mcr", "accuracy", "rouge_l", "worst_wording")
LIMITS = {"corrected_cr": (-math.inf, 1.0)}  # all others are shares


@dataclasses.dataclass(frozen=True, slots=True)
class Estimates:
    """Estimates over one set of tasks: by model and metric, and the paired differences b - a."""

    models: dict[str, dict[str, Estimate]]
    differences: list[Difference]


def estimate_columns(
    samples: Sequence[TaskSample],
    sets: dict[str, list[int]],
    names: Sequence[str],
    group: tuple[str, ...],
    num_resamples: int,
    seed: int,
) -> dict[str, Estimates]:
    """Return the macro means and paired differences of a group of metrics for every set of task indices."""
    points_TM = np.array([sample.point() for sample in samples]).reshape(len(samples), len(names) * len(group))
    large = [name for name, members in sets.items() if len(members) >= MIN_TASKS_BOOTSTRAP]
    resampled = dict(
        zip(large, two_level_bootstrap(samples, [sets[name] for name in large], num_resamples, seed), strict=True)
    )
    results = {}
    for set_name, members in sets.items():
        points = points_TM[members]
        draws = resampled.get(set_name)
        column = {pair: index for index, pair in enumerate(itertools.product(names, group))}

        def one(index: int, minus: int | None = None, points: Any = points, draws: Any = draws) -> Estimate:
            metric = group[index % len(group)]
            drawn = draws is not None and metric not in EXTREMES
            if minus is None:
                return estimate(points[:, index], draws[:, index] if drawn else None, LIMITS.get(metric, SHARE))
            moved = draws[:, index] - draws[:, minus] if drawn else None
            return estimate(points[:, index] - points[:, minus], moved)

        results[set_name] = Estimates(
            {name: {metric: one(column[name, metric]) for metric in group} for name in names},
            [
                Difference(a=a, b=b, metric=metric, estimate=one(column[b, metric], column[a, metric]))
                for a, b in itertools.combinations(names, 2)
                for metric in COMPARED
                if metric in group
            ],
        )
    return results


def estimate_models(
    results: Results, num_resamples: int, seed: int
) -> tuple[dict[str, dict[str, SetMetrics]], dict[str, tuple[Difference, ...]]]:
    """Return every model's metrics by set of tasks, {model: {set: metrics}}, and the differences by set of tasks."""
    samples = [
        answer_sample(grid, [results.scored[name][index] for name in results.names])
        for index, grid in enumerate(results.grids)
    ]
    consistency = [
        consistency_sample([results.columns[name][position] for name in results.names])
        for position in range(len(results.eligible))
    ]
    seen = [grid.task.seen for grid in results.grids]
    groups = []
    for group, ones, indices in ((CONSISTENCY, consistency, results.eligible), (ANSWERS, samples, range(len(seen)))):
        sets = {
            "all": list(range(len(ones))),
            "seen": [position for position, index in enumerate(indices) if seen[index]],
            "unseen": [position for position, index in enumerate(indices) if not seen[index]],
        }
        groups.append(estimate_columns(ones, sets, results.names, group, num_resamples, derive_seed(seed, "bootstrap")))
    first, second = groups
    models = {
        name: {which: SetMetrics(**first[which].models[name], **second[which].models[name]) for which in TASK_SETS}
        for name in results.names
    }
    order = {pair: index for index, pair in enumerate(itertools.combinations(results.names, 2))}
    differences = {}
    for which in TASK_SETS:
        rows = [*first[which].differences, *second[which].differences]
        rows.sort(key=lambda row: (order[row.a, row.b], COMPARED.index(row.metric)))
        differences[which] = tuple(rows)
    return models, differences
