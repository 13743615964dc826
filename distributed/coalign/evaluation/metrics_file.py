"""TODO"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from coalign.errors import UserError

METRICS_FILE = "metrics.json"


def read_metrics(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the eval folder of a run (or the folder itself) and its metrics. Raises UserError when there are none."""
    for place in (folder / "eval", folder):
        path = place / METRICS_FILE
        if path.is_file():
            try:
                metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path}: malformed JSON ({error}); run eval again") from error
            if not isinstance(metrics, dict) or "models" not in metrics:
                raise UserError(f"{path} was not written by eval; name a run whose eval step is complete")
            return place, metrics
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
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(metrics, dict) and folder.name in metrics.get("models", ()):
            return path.parent
    return None
