"""The result for people: tables on the terminal, made from metrics.json alone, and reading that file.

Used by page.py, comparison.py and launch/report.py. Knows no model and computes nothing that metrics.json doesn't hold.
"""

from __future__ import annotations

from typing import Any

from coalign.report.formatting import (
    HEADLINE,
    MORE,
    SETS,
    aligned,
    differences_of,
    estimates_of,
    label,
    number,
    shorten,
    task_sets,
    with_interval,
)

NUM_PRINTED = 5  # inconsistent inputs on the terminal; the page shows all


def _difference(metrics: dict[str, Any], row: dict[str, Any]) -> str:
    return f"{label(metrics, row['b'])} - {label(metrics, row['a'])}"


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


def compare_lines(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Return one table with a row for every model of every run."""
    rows = [["run", "model", *HEADLINE.values()]]
    for run, metrics in runs.items():
        for name in metrics["models"]:
            model = estimates_of(metrics, name, "")
            rows.append([run, label(metrics, name), *(with_interval(model[key]) for key in HEADLINE)])
    return aligned(rows)
