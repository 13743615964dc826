"""metrics.json on disk: written, found and read here alone. Its form is declared in metrics_schema.py."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from coalign.errors import UserError
from coalign.evaluation import typed_json
from coalign.evaluation.metrics_schema import Metrics
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

    Raises UserError for a newer version, and for a field that is missing, unknown or of another type.
    """
    return typed_json.read_version(Metrics, content, VERSION, file)


def write_metrics(folder: Path, metrics: Metrics) -> None:
    """Write metrics.json into an eval folder."""
    write_json(folder / METRICS_FILE, to_json(metrics))


def read_metrics(folder: Path) -> tuple[Path, Metrics]:
    """Return the eval folder of a run (or the folder itself) and its metrics. Raises UserError when there are none."""
    for place in (folder / "eval", folder):
        path = place / METRICS_FILE
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: malformed JSON ({error}); run eval again") from error
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
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        models = content.get("models") if isinstance(content, dict) else None
        if isinstance(models, dict) and folder.name in models:
            return path.parent
    return None
