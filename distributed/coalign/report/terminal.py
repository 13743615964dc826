"""The result for people: tables on the terminal, made from metrics.json alone, and reading that file.

Used by page.py, comparison.py and launch/report.py. Knows no model and computes nothing that metrics.json doesn't hold.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalign.errors import UserError

METRICS = "metrics.json"
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
NUM_PRINTED = 5  # inconsistent inputs on the terminal; the page shows all
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


def _difference(metrics: dict[str, Any], row: dict[str, Any]) -> str:
    return f"{label(metrics, row['b'])} - {label(metrics, row['a'])}"


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


def headline_lines(metrics: dict[str, Any]) -> list[str]:
    """Return the headline table and the paired differences, by set of tasks."""
    lines: list[str] = []
    for which in task_sets(metrics):
        first = estimates_of(metrics, next(iter(metrics["models"])), which)
        lines += [
            "",
            f"{SETS[which]} (CR over {first['cr']['num_tasks']}, accuracy over {first['accuracy']['num_tasks']})",
        ]
        head = ["", *HEADLINE.values()]
        table = [
            [label(metrics, name), *(with_interval(estimates_of(metrics, name, which)[key]) for key in HEADLINE)]
            for name in metrics["models"]
        ]
        differences = [
            [_difference(metrics, row), *(with_interval(row.get(key), signed=True) for key in HEADLINE)]
            for row in differences_of(metrics, which)
        ]
        lines += aligned([head, *table, *differences])
    left_out = metrics["num_tasks"] - metrics["num_tasks_in_cr"]
    if left_out:
        needed = f"with fewer than {metrics['min_wordings']} wordings for an input"
        lines += ["", f"CR leaves out tasks {needed}: {left_out} of {metrics['num_tasks']} (paraphrase.num_test)."]
    constant = constant_sentence(metrics)
    return [*lines, "", constant] if constant else lines


def constant_sentence(metrics: dict[str, Any]) -> str:
    """Return how far the models are above always giving a task's most frequent answer, "" where eval didn't say."""
    found = metrics.get("constant_answer")
    if not found:
        return ""
    above = "; ".join(
        f"{label(metrics, name)} {with_interval(one, signed=True)}" for name, one in found["differences"].items()
    )
    return (
        "One constant answer a task, its most frequent gold answer, would have an accuracy of"
        f" {number(found['accuracy']['mean'])}; minus that, accuracy: {above}."
    )


def more_lines(metrics: dict[str, Any]) -> list[str]:
    """Return what stands beside CR: expected CR, shares of outcomes, noise floors, agreement of the modes, drops."""
    head = [
        "",
        *MORE.values(),
        "CR among batch neighbours",
        f"CR at temperature {metrics['noise_temperature']}",
        "modes agree",
    ]
    table = [
        [
            label(metrics, name),
            *(number(model[key]["mean"]) for key in MORE),
            number(model["noise"]["neighbours"]["cr"]),
            number(model["noise"]["temperature"]["cr"]),
            number(model["modes_agree"]["share"]),
        ]
        for name, model in metrics["models"].items()
    ]
    columns = list(zip(head, *table, strict=True))
    lines = ["", *aligned(columns)]
    lines += _counts(metrics)
    return lines


def _counts(metrics: dict[str, Any]) -> list[str]:
    lines = []
    for name, model in metrics["models"].items():
        counts = model["counts"]
        silent = ", ".join(
            f"{counts[key]} {key.replace('_', ' ')}" for key in ("empty", "cut_off", "foreign_vocabulary")
        )
        lines.append(f"{label(metrics, name)}: {counts['answers']} answers ({silent})")
    dropped = ", ".join(f"{count} {reason}" for reason, count in metrics.get("dropped", {}).items())
    lines.append(f"dropped: {dropped or 'nothing'}")
    return ["", *lines]


def cost_lines(metrics: dict[str, Any]) -> list[str]:
    """Return what each step of the run has used, a dash where that isn't known."""
    keys = ("updates", "tokens_trained", "tokens_generated", "wall_seconds")
    rows = [["cost", *(key.replace("_", " ") for key in keys), "core-hours"]]
    for row in metrics["cost"]:
        cells = ["–" if row[key] is None else f"{row[key]:,}" for key in keys]
        rows.append([row["step"], *cells, number(row["core_hours"])])
    return ["", *aligned(rows)] if metrics["cost"] else []


def shorten(text: str, limit: int = _SHORT) -> str:
    """Return a text on one line, cut with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def inconsistent_lines(metrics: dict[str, Any], limit: int = NUM_PRINTED) -> list[str]:
    """Return the most inconsistent inputs with their distinct answers, shortened."""
    rows = metrics["most_inconsistent"]
    if not rows:
        return ["", "no inconsistent input"]
    shown = f"{min(limit, len(rows))} of {len(rows)} in the report"
    lines = ["", f"most inconsistent inputs of {label(metrics, rows[0]['model'])} ({shown})"]
    for row in rows[:limit]:
        times: dict[str, int] = {}
        for answer in row["answers"]:
            times[answer["text"]] = times.get(answer["text"], 0) + 1
        answers = " | ".join(f"{shorten(text, 30) or '(empty)'} x{count}" for text, count in times.items())
        lines.append(f"  CR {number(row['cr'])}  {row['task']}: {shorten(row['input'])}")
        lines.append(f"    expected {shorten(row['golds'][0], 30)}; answers {answers}")
    return lines


def text_report(metrics: dict[str, Any]) -> list[str]:
    """Return everything that eval prints."""
    return [*headline_lines(metrics), *more_lines(metrics), *cost_lines(metrics), *inconsistent_lines(metrics)]


def read_metrics(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the eval folder of a run (or the folder itself) and its metrics. Raises UserError when there are none."""
    for place in (folder / "eval", folder):
        path = place / METRICS
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
        f"{folder} holds neither eval/{METRICS} nor {METRICS}; run its eval step first: python launch/eval.py"
    )


def _evaluated_together(folder: Path) -> Path | None:
    """Return the eval folder beside a run that has a model of the run's name, the smallest name first."""
    for path in sorted(folder.parent.glob(f"eval*/{METRICS}")):
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(metrics, dict) and folder.name in metrics.get("models", ()):
            return path.parent
    return None


def compare_lines(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Return one table with a row for every model of every run."""
    rows = [["run", "model", *HEADLINE.values()]]
    for run, metrics in runs.items():
        for name in metrics["models"]:
            model = estimates_of(metrics, name, "")
            rows.append([run, label(metrics, name), *(with_interval(model[key]) for key in HEADLINE)])
    return aligned(rows)
