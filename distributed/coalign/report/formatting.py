"""Numbers, names and rows as text: what the terminal, pages, cards and the ladder's table have in common.

Knows no file and no HTML.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from coalign.evaluation.metrics_schema import TASK_SETS, Estimate, Metrics

REPORT = "report.html"

METRIC_NAMES = {
    "cr": "CR",
    "corrected_cr": "corrected CR",
    "mcr": "MCR",
    "accuracy": "accuracy",
    "rouge_l": "ROUGE-L",
    "worst_wording": "worst wording",
    "expected_cr": "expected CR",
    "always_right": "always right",
    "always_wrong_alike": "always wrong alike",
    "inconsistent": "inconsistent",
    "mixed": "mixed",
    "rouge_1": "ROUGE-1",
    "spread": "spread",
}


def names_of(*metrics: str) -> dict[str, str]:
    """Return {metric: its name for people}, in this order."""
    return {metric: METRIC_NAMES[metric] for metric in metrics}


HEADLINE = names_of("cr", "corrected_cr", "mcr", "accuracy", "rouge_l", "worst_wording")
MORE = {metric: name for metric, name in METRIC_NAMES.items() if metric not in HEADLINE}
SET_NAMES = {"all": "all tasks", "seen": "seen tasks", "unseen": "unseen tasks"}

_SHORT = 70


class Interval(Protocol):
    """A mean with the ends of its interval."""

    @property
    def mean(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


class TaskCounts(Protocol):
    """A result that says how many of its tasks are seen in training."""

    @property
    def num_tasks(self) -> int: ...
    @property
    def num_seen_tasks(self) -> int: ...


def number(value: float | None, *, signed: bool = False) -> str:
    """Return a share with three digits, a dash for None."""
    if value is None:
        return "–"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def with_interval(estimate: Interval | None, *, signed: bool = False) -> str:
    """Return "mean [low, high]", without the bracket where there is no interval."""
    if estimate is None:
        return "–"
    text = number(estimate.mean, signed=signed)
    if estimate.low is None:
        return text
    return f"{text} [{number(estimate.low, signed=signed)}, {number(estimate.high, signed=signed)}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines of columns, the first left and the others right aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def shown_sets(counts: TaskCounts) -> list[str]:
    """Return which of TASK_SETS to show: seen and unseen apart only where there are both."""
    return [*TASK_SETS] if 0 < counts.num_seen_tasks < counts.num_tasks else ["all"]


@dataclasses.dataclass(frozen=True, slots=True)
class PairedRow:
    """The paired differences b - a of two models, by metric."""

    a: str
    b: str
    estimates: dict[str, Estimate]


def paired_rows(metrics: Metrics, which: str) -> list[PairedRow]:
    """Return the paired differences over one of TASK_SETS, a row per pair of models."""
    rows: dict[tuple[str, str], PairedRow] = {}
    for one in metrics.differences_over(which):
        rows.setdefault((one.a, one.b), PairedRow(one.a, one.b, {})).estimates[one.metric] = one.estimate
    return list(rows.values())


def shorten(text: str, limit: int = _SHORT) -> str:
    """Return a text on one line, cut with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
