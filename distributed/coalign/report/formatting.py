"""Numbers, names and rows as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPORT = "report.html"

HEADLINE = {
    "cr": "CR",
    "corrected_cr": "corrected CR",
    "mcr": "MCR",
    "accuracy": "accuracy",
    "rouge_l": "ROUGE-L",
    "worst_wording": "worst wording",
}


MORE = {
    "expected_cr": "expected CR",
    "always_right": "always right",
    "always_wrong_alike": "always wrong alike",
    "inconsistent": "inconsistent",
    "mixed": "mixed",
    "rouge_1": "ROUGE-1",
    "spread": "spread",
}


SETS = {"": "all tasks", "seen": "seen tasks", "unseen": "unseen tasks"}


_SHORT = 70


def number(value: float | None, *, signed: bool = False) -> str:
    """Return a share with three digits, a dash for null."""
    if value is None:
        return "–"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def with_interval(estimate: dict[str, Any] | None, *, signed: bool = False) -> str:
    """Return "mean [low, high]", without the bracket where there is no interval."""
    if estimate is None:
        return "–"
    text = number(estimate["mean"], signed=signed)
    if estimate["low"] is None:
        return text
    return f"{text} [{number(estimate['low'], signed=signed)}, {number(estimate['high'], signed=signed)}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines of columns, the first left and the others right aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def label(metrics: dict[str, Any], name: str) -> str:
    """Return what to call a model: the paper's name of a stage of the run, the name in eval.models of any other."""
    labels: dict[str, str] = metrics.get("labels", {})
    return labels.get(name, name)


def task_sets(metrics: dict[str, Any]) -> list[str]:
    """Return the keys of SETS to show: seen and unseen apart only where there are both."""
    both = 0 < metrics["num_seen_tasks"] < metrics["num_tasks"]
    return list(SETS) if both else [""]


def estimates_of(metrics: dict[str, Any], name: str, which: str) -> dict[str, Any]:
    """Return a model's estimates over one of SETS."""
    model: dict[str, Any] = metrics["models"][name]
    chosen: dict[str, Any] = model[which] if which else model
    return chosen


def differences_of(metrics: dict[str, Any], which: str) -> list[dict[str, Any]]:
    """Return the paired differences over one of SETS, a row a pair of models: {a, b, metric: estimate, ...}."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in metrics[f"differences_{which}" if which else "differences"]:
        rows.setdefault((row["a"], row["b"]), {"a": row["a"], "b": row["b"]})[row["metric"]] = row
    return list(rows.values())


def shorten(text: str, limit: int = _SHORT) -> str:
    """Return a text on one line, cut with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
