"""The result for people on the terminal: tables and lines, made from metrics.json alone.

Knows no model and computes nothing that metrics.json doesn't hold.
"""

from __future__ import annotations

from collections.abc import Mapping

from coalign.display import on_one_line
from coalign.evaluation.metrics_schema import Metrics
from coalign.report.formatting import (
    HEADLINE,
    MORE,
    SET_NAMES,
    PairedRow,
    aligned,
    number,
    paired_rows,
    shorten,
    shown_sets,
    with_interval,
)
from coalign.report.sentences import constant_sentence, judge_sentence

NUM_PRINTED = 5  # inconsistent inputs on the terminal; the page shows all


def _difference(metrics: Metrics, row: PairedRow) -> str:
    return f"{metrics.label(row.b)} - {metrics.label(row.a)}"


def headline_lines(metrics: Metrics) -> list[str]:
    """Return the headline table and the paired differences, by set of tasks."""
    lines: list[str] = []
    for which in shown_sets(metrics):
        first = next(iter(metrics.models.values())).over(which)
        lines += ["", f"{SET_NAMES[which]} (CR over {first.cr.num_tasks}, accuracy over {first.accuracy.num_tasks})"]
        head = ["", *HEADLINE.values()]
        table = [
            [metrics.label(name), *(with_interval(model.over(which).of(key)) for key in HEADLINE)]
            for name, model in metrics.models.items()
        ]
        differences = [
            [_difference(metrics, row), *(with_interval(row.estimates.get(key), signed=True) for key in HEADLINE)]
            for row in paired_rows(metrics, which)
        ]
        lines += aligned([head, *table, *differences])
    left_out = metrics.num_tasks - metrics.num_tasks_in_cr
    if left_out:
        needed = f"with fewer than {metrics.min_wordings} wordings for an input"
        lines += ["", f"CR leaves out tasks {needed}: {left_out} of {metrics.num_tasks} (paraphrase.num_test)."]
    for sentence in (constant_sentence(metrics), judge_sentence(metrics)):
        lines += ["", sentence] if sentence else []
    return lines


def more_lines(metrics: Metrics) -> list[str]:
    """Return what supplements CR: expected CR, shares of outcomes, noise floors, agreement of the modes, drops."""
    head = [
        "",
        *MORE.values(),
        "CR among batch neighbours",
        f"CR at temperature {metrics.noise_temperature}",
        "modes agree",
    ]
    table = [
        [
            metrics.label(name),
            *(number(model.all.of(key).mean) for key in MORE),
            number(model.noise.neighbours.cr),
            number(model.noise.temperature.cr),
            number(model.modes_agree.share),
        ]
        for name, model in metrics.models.items()
    ]
    columns = list(zip(head, *table, strict=True))
    return ["", *aligned(columns), *_count_lines(metrics)]


def _count_lines(metrics: Metrics) -> list[str]:
    lines = []
    for name, model in metrics.models.items():
        counts = model.counts
        silent = f"{counts.empty} empty, {counts.cut_off} cut off, {counts.foreign_vocabulary} foreign vocabulary"
        lines.append(f"{metrics.label(name)}: {counts.answers} answers ({silent})")
    dropped = ", ".join(f"{count} {reason}" for reason, count in metrics.dropped.items())
    lines.append(f"dropped: {dropped or 'nothing'}")
    return ["", *lines]


def cost_lines(metrics: Metrics) -> list[str]:
    """Return what each step of the run has used, a dash where that isn't known."""
    if not metrics.cost:
        return []
    rows = [["cost", "updates", "tokens trained", "tokens generated", "wall seconds", "core-hours"]]
    for row in metrics.cost:
        used = (row.updates, row.tokens_trained, row.tokens_generated, row.wall_seconds)
        cells = ["–" if value is None else f"{value:,}" for value in used]
        rows.append([row.step, *cells, number(row.core_hours)])
    return ["", *aligned(rows)]


def inconsistent_lines(metrics: Metrics, limit: int = NUM_PRINTED) -> list[str]:
    """Return the most inconsistent inputs with their distinct answers, shortened."""
    rows = metrics.most_inconsistent
    if not rows:
        return ["", "no inconsistent input"]
    shown = f"{min(limit, len(rows))} of {len(rows)} in the report"
    lines = ["", f"most inconsistent inputs of {metrics.label(rows[0].model)} ({shown})"]
    for row in rows[:limit]:
        times: dict[str, int] = {}
        for answer in row.answers:
            times[answer.text] = times.get(answer.text, 0) + 1
        answers = " | ".join(f"{shorten(text, 30) or '(empty)'} x{count}" for text, count in times.items())
        lines.append(f"  CR {number(row.cr)}  {row.task}: {shorten(row.input)}")
        lines.append(f"    expected {shorten(row.golds[0], 30)}; answers {answers}")
    return lines


def text_report(metrics: Metrics) -> list[str]:
    """Return everything that eval prints."""
    lines = [*headline_lines(metrics), *more_lines(metrics), *cost_lines(metrics), *inconsistent_lines(metrics)]
    return [on_one_line(line) for line in lines]


def compare_lines(runs: Mapping[str, Metrics]) -> list[str]:
    """Return one table with a row for every model of every run."""
    rows = [["run", "model", *HEADLINE.values()]]
    for run, metrics in runs.items():
        for name, model in metrics.models.items():
            rows.append([run, metrics.label(name), *(with_interval(model.all.of(key)) for key in HEADLINE)])
    return [on_one_line(line) for line in aligned(rows)]
