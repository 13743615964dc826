"""Tables about wordings on the page: which fail, and each task's worst and best under the last model.

Knows metrics.json and no HTML.
"""

from __future__ import annotations

import dataclasses

from coalign.evaluation.metrics_schema import Metrics
from coalign.report.case_tables import MAX_WORDING
from coalign.report.formatting import shorten

NUM_HARDEST = 12


@dataclasses.dataclass(frozen=True, slots=True)
class HardWording:
    """A wording that fails more often than the others of its task: `accuracy` by model, `below` the task's mean."""

    task: str
    text: str
    accuracy: dict[str, float]
    mean: float
    below: float


@dataclasses.dataclass(frozen=True, slots=True)
class WordingRange:
    """A task's worst and best wording as (accuracy, text)."""

    task: str
    worst: tuple[float, str]
    best: tuple[float, str]

    @property
    def spread(self) -> float:
        """Return how much more accurate the best one is."""
        return self.best[0] - self.worst[0]


def hardest_wordings(metrics: Metrics) -> list[HardWording]:
    """Return the wordings whose accuracy under the last model is furthest below their task's mean over wordings."""
    name = list(metrics.models)[-1]
    of_task: dict[str, list[float]] = {}
    for row in metrics.per_wording:
        of_task.setdefault(row.task, []).append(row.models[name].accuracy)
    rows = []
    for row in metrics.per_wording:
        values = of_task[row.task]
        mean = sum(values) / len(values)
        below = mean - row.models[name].accuracy
        if len(values) > 1 and below > 0:
            accuracy = {model: one.accuracy for model, one in row.models.items()}
            rows.append(HardWording(row.task, shorten(row.text, MAX_WORDING), accuracy, mean, below))
    return sorted(rows, key=lambda row: (-row.below, row.task))[:NUM_HARDEST]


def wording_ranges(metrics: Metrics) -> list[WordingRange]:
    """Return each task's worst and best wording under the last model, the widest spread first."""
    name = list(metrics.models)[-1]
    of_task: dict[str, list[tuple[float, str]]] = {}
    for row in metrics.per_wording:
        text = shorten(row.text, MAX_WORDING)
        of_task.setdefault(row.task, []).append((row.models[name].accuracy, text))
    rows = [WordingRange(task, min(found), max(found)) for task, found in of_task.items()]
    apart = [row for row in rows if row.spread > 0]
    return sorted(apart, key=lambda row: (-row.spread, row.task, row.worst, row.best))[: 2 * NUM_HARDEST]
