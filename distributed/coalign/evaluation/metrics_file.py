"""metrics.json on disk: written, found and read here alone. Its form is declared in metrics_schema.py."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coalign.errors import UserError
from coalign.evaluation import typed_json
from coalign.evaluation.metrics_schema import TASK_SETS, Metrics, SetMetrics
from coalign.files import read_json
from coalign.runs.atomic_files import write_json

METRICS_FILE = "metrics.json"
VERSION = 2
"""Version of the form of metrics.json. It grows when a field is added, removed or changes its meaning. A file without
a version was written before version 1 and counts as version 0."""


def to_json(metrics: Metrics) -> dict[str, Any]:
    """Return the content of metrics.json, the version first."""
    return typed_json.with_version(metrics, VERSION)


def from_json(content: dict[str, Any], file: str = METRICS_FILE) -> Metrics:
    """Return the metrics from the content of a file.

    Raises UserError for a newer version, for a field that is missing, unknown or of another type, and for parts that
    contradict one another.
    """
    metrics = typed_json.read_version(Metrics, content, VERSION, file)
    if complaint := contradiction_in(metrics):
        raise UserError(f"{file}: {complaint}; restore the file as it was written, or run eval again")
    return metrics


def contradiction_in(metrics: Metrics) -> str:
    """Return which part of the metrics names what another part lacks, "" when they fit together."""
    models, tasks = set(metrics.models), {row.task for row in metrics.per_task}
    wordings = {(row.task, row.wording) for row in metrics.per_wording}
    failures = metrics.failures.per_task if metrics.failures else ()
    constant = metrics.constant_answer.differences if metrics.constant_answer else metrics.models
    by_model: list[tuple[str, Mapping[str, object]]] = [
        *((f"per_task of {one.task}", one.models) for one in metrics.per_task),
        *((f"per_wording of {one.wording}", one.models) for one in metrics.per_wording),
        *((f"cases of {one.example}", one.models) for one in metrics.cases),
        *((f"failures of {one.task}", one.models) for one in failures),
        ("failures", metrics.failures.models if metrics.failures else metrics.models),
        ("constant_answer", constant),
    ]
    for place, found in by_model:
        if found.keys() != models:
            return f"{place} has the models {', '.join(found) or 'none'}, and models has {', '.join(metrics.models)}"
    for which in TASK_SETS:
        for pair in metrics.differences_over(which):
            if not {pair.a, pair.b} <= models or pair.metric not in SetMetrics.__annotations__:
                return f"a difference names {pair.a}, {pair.b} and {pair.metric}, one of which is unknown"
    for case in metrics.cases:
        if case.task not in tasks or not {(case.task, wording) for wording in case.wordings} <= wordings:
            return f"cases: {case.example} has a task or wording that is unknown"
        if any(len(model.answers) != len(case.wordings) for model in case.models.values()):
            return f"cases: {case.example} has not one answer per wording"
    for row in metrics.most_inconsistent:
        if row.model not in models or row.task not in tasks:
            return f"most_inconsistent: {row.example} has a model or task that is unknown"
    return ""


def write_metrics(folder: Path, metrics: Metrics) -> None:
    """Write metrics.json into an eval folder."""
    write_json(folder / METRICS_FILE, to_json(metrics))


def read_metrics(folder: Path) -> tuple[Path, Metrics]:
    """Return the eval folder of a run (or the folder itself) and its metrics. Raises UserError when there are none."""
    for place in (folder / "eval", folder):
        path = place / METRICS_FILE
        if path.exists():
            content = read_json(path)
            if not isinstance(content, dict) or not content.get("models"):
                raise UserError(f"{path} was not written by eval; name a run whose eval step is complete")
            return place, from_json(content, str(path))
    if together := _evaluated_together(folder.resolve()):
        raise UserError(
            f"{folder} has no eval of its own; this arm was evaluated together with the others:"
            f" {shlex.join(['python', 'launch/report.py', str(together)])}"
        )
    raise UserError(
        f"{folder} holds neither eval/{METRICS_FILE} nor {METRICS_FILE}; run its eval step first: python launch/eval.py"
    )


def _evaluated_together(folder: Path) -> Path | None:
    """Return the eval folder beside a run that has a model of the run's name, the smallest name first."""
    for path in sorted(folder.parent.glob(f"eval*/{METRICS_FILE}")):
        try:
            content = read_json(path)
        except UserError:
            continue
        models = content.get("models") if isinstance(content, dict) else None
        if isinstance(models, dict) and folder.name in models:
            return path.parent
    return None
