"""Several runs side by side: a column a run and model, the settings that differ, paired differences by task.

Used by launch/report.py. Two runs are compared by pairs only on tasks that were evaluated on the same inputs, gold
answers and wordings, which their metrics.json tells by a digest. Knows no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coalign import charts, history
from coalign.artifacts import write_atomic
from coalign.charts import Dot
from coalign.figures import Figure, describe
from coalign.intervals import estimate
from coalign.page import environment
from coalign.report import label

COMPARE = "compare.html"
ROWS = {
    "accuracy": "accuracy",
    "cr": "CR",
    "corrected_cr": "corrected CR",
    "mcr": "MCR",
    "worst_wording": "worst wording",
}
MAX_TASKS = 300  # shown of a pair of runs
_OWN = ("run.name", "run.folder", "eval.folder")  # differ between any two runs


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A run to compare: what to call it, its eval folder and metrics."""

    name: str
    folder: Path
    metrics: dict[str, Any]


def name_runs(found: dict[str, tuple[Path, dict[str, Any]]]) -> list[Run]:
    """Return the runs by their own names, or by the paths as given where two have the same name."""
    names = [metrics.get("run", given) for given, (_, metrics) in found.items()]
    same = len(set(names)) < len(names)
    return [
        Run(given if same else name, folder, metrics)
        for name, (given, (folder, metrics)) in zip(names, found.items(), strict=True)
    ]


def write_comparison(path: Path, runs: Sequence[Run]) -> Path:
    """Write the page and return its path."""
    write_atomic(path, render_comparison(runs))
    return path


def render_comparison(runs: Sequence[Run]) -> str:
    """Return the page: one file, no network, every text escaped."""
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            runs=runs,
            models=[],
            rows=ROWS,
            labels={run.name: {name: label(run.metrics, name) for name in run.metrics["models"]} for run in runs},
            figures=[
                _figure(runs, key, title) for key, title in (("cr", "Consistency (CR)"), ("accuracy", "Accuracy"))
            ],
            settings=setting_rows(runs),
            pairs=[compare_pair(runs[0], other) for other in runs[1:]],
        )
    )


def _figure(runs: Sequence[Run], key: str, title: str) -> Figure:
    dots = []
    for index, run in enumerate(runs):
        for name, model in run.metrics["models"].items():
            one = model[key]
            colour = charts.SERIES[index % len(charts.SERIES)]
            short = run.name if len(run.name) <= 14 else f"…{run.name[-13:]}"
            dots.append(Dot(f"{short} · {name}", one["mean"], one["low"], one["high"], colour))
    caption = "Bar: 95 % interval of the model by itself; for a difference read the paired ones below."
    return Figure(title, caption, charts.interval_dots(dots, f"{title}: {describe(dots)}"))


def setting_rows(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Return the settings that are not the same in all runs, with every run's value."""
    of_run = []
    defaults: dict[str, Any] = {}
    for run in runs:
        steps, _ = history.find_steps(run.folder, run.metrics)
        changed = history.changed_settings(steps, run.metrics)
        defaults |= {one.key: one.default for one in changed}
        of_run.append({one.key: one.usual for one in changed})
    rows = [(key, [values.get(key, default) for values in of_run]) for key, default in defaults.items()]
    return [(key, values) for key, values in rows if key not in _OWN and any(value != values[0] for value in values)]


def compare_pair(first: Run, second: Run) -> dict[str, Any]:
    """Return the paired differences second - first by model and task: {title, why_not, models, tasks, note}."""
    result: dict[str, Any] = {"title": f"{second.name} − {first.name}", "why_not": "", "models": [], "tasks": []}
    a, b = first.metrics, second.metrics
    for key, what in (("split", "splits"), ("agreement", "agreements")):
        if a[key] != b[key]:
            return result | {"why_not": f"they were evaluated with different {what} ({a[key]} and {b[key]})"}
    rows = shared_tasks(a, b)
    if not rows:
        return result | {"why_not": _why_nothing_shared(a, b)}
    names = [(name, name) for name in a["models"] if name in b["models"]]
    names = names or [(list(a["models"])[-1], list(b["models"])[-1])]
    result["note"] = f"{len(rows)} of {len(a['per_task'])} and {len(b['per_task'])} tasks have the same items."
    for one, other in names:
        estimates = {}
        for key in ROWS:
            found = [
                y["models"][other][key] - x["models"][one][key]
                for x, y in rows
                if x["models"][one][key] is not None and y["models"][other][key] is not None
            ]
            estimates[key] = estimate(np.array(found, float))
        result["models"].append({"name": one if one == other else f"{other} − {one}", "estimates": estimates})
    one, other = names[-1]
    result["last"] = one if one == other else f"{other} − {one}"
    result["tasks"] = [
        {"task": x["task"], "before": x["models"][one], "after": y["models"][other]} for x, y in rows[:MAX_TASKS]
    ]
    return result


def shared_tasks(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the rows of both runs of each task that was evaluated on the same items in both."""
    of_task = {row["task"]: row for row in b["per_task"]}
    both = [(row, of_task[row["task"]]) for row in a["per_task"] if row["task"] in of_task]
    return [(x, y) for x, y in both if x.get("items") is not None and x.get("items") == y.get("items")]


def _why_nothing_shared(a: dict[str, Any], b: dict[str, Any]) -> str:
    if not {row["task"] for row in a["per_task"]} & {row["task"] for row in b["per_task"]}:
        return "they have no task in common"
    if any("items" not in row for row in (*a["per_task"], *b["per_task"])):
        return "one of them was evaluated by an older version, which kept no digest of the items; run its eval again"
    return "none of their common tasks was evaluated on the same inputs, gold answers and wordings"
