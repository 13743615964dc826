"""Macro means over tasks with intervals: a two-level bootstrap (tasks, then inputs), or a t interval on few tasks.

Knows no metric: a task is a number of inputs and a statistic of their weights. estimates.py pairs two models.

Shape suffixes: T tasks, I inputs of a task, B resamples, M columns (metrics times models).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from coalign.evaluation.metrics_schema import Estimate

FloatArray = NDArray[np.float64]

LEVEL = 0.95
MIN_TASKS_INTERVAL = 6  # below: the mean alone
MIN_TASKS_BOOTSTRAP = 20  # below: a t interval on task means
NO_LIMITS = (-math.inf, math.inf)
SHARE = (0.0, 1.0)  # limits of a share; a difference of shares has none that matter
_MAX_DRAWS = 4_000_000  # resampled inputs held at once


@dataclasses.dataclass(frozen=True, slots=True)
class TaskSample:
    """One task: `statistic` maps weights_BI (rows sum to 1) to its columns values_BM."""

    num_inputs: int
    statistic: Callable[[FloatArray], FloatArray]

    def point(self) -> FloatArray:
        """Return the columns point_M with every input counted once."""
        weights_1I = np.full((1, self.num_inputs), 1.0 / self.num_inputs)
        point_M: FloatArray = self.statistic(weights_1I)[0]
        return point_M


def resampled_columns(sample: TaskSample, num_resamples: int, rng: np.random.Generator) -> FloatArray:
    """Return values_BM of a task whose inputs are drawn anew, with replacement, for each of B resamples."""
    size = sample.num_inputs
    rows = max(1, min(num_resamples, _MAX_DRAWS // size))
    parts = []
    for start in range(0, num_resamples, rows):
        count = min(rows, num_resamples - start)
        draws = rng.integers(0, size, size=(count, size), dtype=np.int64)
        draws += np.arange(count, dtype=np.int64)[:, None] * size
        weights_BI = np.bincount(draws.ravel(), minlength=count * size).reshape(count, size) / size
        parts.append(sample.statistic(weights_BI))
    return np.concatenate(parts)


def two_level_bootstrap(
    samples: Sequence[TaskSample], sets: Sequence[Sequence[int]], num_resamples: int, seed: int
) -> list[FloatArray]:
    """Return for every set of task indices the B resampled macro means, shape (B, M): tasks are drawn, then inputs.

    The columns of one resample share their draws, so that differences between columns are paired. Each draw of a task
    takes another row of its B input resamples.
    """
    rng = np.random.default_rng(seed)
    times = [
        rng.multinomial(len(members), np.full(len(members), 1.0 / len(members)), size=num_resamples) for members in sets
    ]
    totals: list[FloatArray | None] = [None] * len(sets)
    for index, sample in enumerate(samples):
        if not any(index in members for members in sets):
            continue
        inner_BM = resampled_columns(sample, num_resamples, rng)
        for which, members in enumerate(sets):
            if index not in members:
                continue
            drawn_B = times[which][:, list(members).index(index)]
            total = totals[which]
            if total is None:
                total = np.zeros_like(inner_BM)
            for repeat in range(1, int(drawn_B.max()) + 1):
                rows = rng.permutation(num_resamples)
                total += np.where((drawn_B >= repeat)[:, None], inner_BM[rows], 0.0)
            totals[which] = total
    return [total / len(members) for total, members in zip(totals, sets, strict=True) if total is not None]


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile (over 0.5) of Student's t: bisection on its distribution function.

    With t = sqrt(v) tan(u), P(0 < T < t) is the integral of cos^(v-1) from 0 to u over twice that from 0 to pi/2.
    """
    nodes = np.linspace(0.0, 1.0, 2001)
    simpson = np.full(2001, 2.0)
    simpson[1::2] = 4.0
    simpson[[0, -1]] = 1.0

    def mass(upper: float) -> float:
        return float((simpson * np.cos(nodes * upper) ** (degrees - 1)).sum()) * upper

    whole = mass(math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + 0.5 * mass(middle) / whole < probability else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def estimate(
    points_T: FloatArray, resampled_B: FloatArray | None = None, limits: tuple[float, float] = NO_LIMITS
) -> Estimate:
    """Return the mean of one column with its 95 % interval, None where there is no interval.

    The interval is cut at `limits`, the least and the greatest value that the column can have.
    """
    num_tasks = len(points_T)
    mean = float(points_T.mean()) if num_tasks else None
    if mean is None or num_tasks < MIN_TASKS_INTERVAL:
        return Estimate(mean=mean, low=None, high=None, num_tasks=num_tasks, method="none")
    tail = (1.0 - LEVEL) / 2
    method: Literal["bootstrap", "t"] = "bootstrap"
    if num_tasks < MIN_TASKS_BOOTSTRAP or resampled_B is None:
        half = t_quantile(1.0 - tail, num_tasks - 1) * float(points_T.std(ddof=1)) / math.sqrt(num_tasks)
        low, high, method = mean - half, mean + half, "t"
    else:
        low, high = map(float, np.quantile(resampled_B, [tail, 1.0 - tail]))
    low, high = max(low, limits[0]), min(high, limits[1])
    return Estimate(mean=mean, low=low, high=high, num_tasks=num_tasks, method=method)
