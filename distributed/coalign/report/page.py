"""The run as one HTML page without links: headline, tasks, wordings, inputs one by one, failures, data, training.

Used by launch/eval.py and launch/report.py. Everything comes from metrics.json and from what the run's steps have left
on disk; a part that has no data is left out. Knows no model and computes nothing that would change a result.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from coalign.evaluation.metrics_file import METRICS_FILE
from coalign.records import ASTRAY
from coalign.report import charts, figures, run_history
from coalign.report.case_tables import MAX_WORDING, OUTCOME_NAMES, case_values, chosen_words, scaled_cases
from coalign.report.formatting import (
    HEADLINE,
    MORE,
    REPORT,
    SETS,
    differences_of,
    estimates_of,
    label,
    number,
    shorten,
    task_sets,
    with_interval,
)
from coalign.report.run_history import StepRecord
from coalign.report.terminal import constant_sentence, text_report
from coalign.runs.atomic_files import write_atomic, write_json
from coalign.steps import TRAINING_STEPS

MAX_BYTES = 2_000_000
SCALES = (1.0, 0.6, 0.35, 0.2, 0.1, 0.05, 0.02)  # of the rows below, taken until the page is small enough
MAX_TASKS, MAX_WORDINGS = 400, 1200
NUM_HARDEST = 12

Metrics = Mapping[str, Any]
_TEMPLATES = Path(__file__).parent / "templates"


def write_results(folder: Path, metrics: dict[str, Any]) -> list[str]:
    """Write metrics.json and the page into an eval folder and return everything that eval prints."""
    write_json(folder / METRICS_FILE, metrics)
    return [*text_report(metrics), "", f"report: {write_page(folder, metrics)}"]


def write_page(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write the page into an eval folder and return its path."""
    steps, missing = run_history.find_steps(folder, metrics)
    path = folder / REPORT
    write_atomic(path, render_page(metrics, steps, missing, run_history.own_step(folder)))
    return path


def render_page(
    metrics: dict[str, Any],
    steps: Sequence[StepRecord] = (),
    missing: Sequence[str] = (),
    own: StepRecord | None = None,
) -> str:
    """Return the page: one file of at most MAX_BYTES, no network, every text escaped; `own` is eval's own step.

    Of a large run it shows fewer inputs, tasks and wordings, and says how many of how many.
    """
    template = environment().get_template("report.html.j2")
    values = page_values(metrics, steps, missing, own)
    page = ""
    for shown in less_and_less(metrics, values["all_cases"]):
        page = template.render(**values | shown)
        if len(page.encode()) <= MAX_BYTES:
            break
    return page


def less_and_less(metrics: Metrics, cases: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what the page shows, of a large run ever less: fewer rows, then result and record, then one sentence."""
    for scale in SCALES:
        yield {
            "detail": "all",
            "cases": scaled_cases(cases, scale),
            "tasks": metrics["per_task"][: max(1, int(MAX_TASKS * scale))],
            "wordings": metrics["per_wording"][: max(1, int(MAX_WORDINGS * scale))],
        }
    yield {"detail": "result"}
    yield {"detail": "sentence", "models": []}


def environment() -> jinja2.Environment:
    """Return the template engine with our filters; everything is escaped."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    numbers = itertools.count()
    found.filters |= {
        "picture": lambda svg: Markup(svg.replace(charts.OWN, f"p{next(numbers)}")),
        "number": number,
        "interval": with_interval,
        "shorten": shorten,
        "css_string": css_string,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "plainly": lambda reason: str(reason).replace("_", " "),
    }
    found.globals |= {
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return found


def css_string(text: str) -> Markup:
    """Return a text as a CSS string in which no character ends the string or the style element."""
    safe = "".join(c if c.isalnum() or c in " -_.()" else f"\\{ord(c):x} " for c in text)
    return Markup(f'"{safe}"')


def page_values(
    metrics: dict[str, Any], steps: Sequence[StepRecord], missing: Sequence[str], own: StepRecord | None
) -> dict[str, Any]:
    """Return everything that the template shows, pictures drawn."""
    settings = run_history.changed_settings(steps, metrics)
    names = list(metrics["models"])
    return {
        "metrics": metrics,
        "models": names,
        "labels": {name: label(metrics, name) for name in names},
        "headline": HEADLINE,
        "more": MORE,
        "sets": {which: SETS[which] for which in task_sets(metrics)},
        "estimates": lambda name, which: estimates_of(metrics, name, which),
        "differences": lambda which: differences_of(metrics, which),
        "sentence": headline_sentence(metrics),
        "wordings_file": metrics["settings"].get("eval.wordings_file", ""),
        "last_stage": last_stage_sentence(metrics),
        "constant": constant_sentence(dict(metrics)),
        "headline_figures": figures.headline_figures(metrics),
        "outcomes": figures.outcome_figure(metrics),
        "task_figures": figures.task_figures(metrics),
        "wording_figures": figures.wording_figures(metrics),
        "hardest": hardest_wordings(metrics),
        "extremes": extreme_wordings(metrics),
        "failure_figure": figures.failure_figure(metrics),
        "kinds": {key: name for key, (name, _) in figures.KIND_PARTS.items()},
        "all_cases": case_values(metrics),
        "outcome_names": OUTCOME_NAMES,
        "chosen": chosen_words(metrics.get("cases", []), label(metrics, names[0]), label(metrics, names[-1])),
        "stories": data_stories(steps),
        "training": [
            (step_title(step), figures.training_figures(step)) for step in steps if step.name in TRAINING_STEPS
        ],
        "settings": settings,
        "config_file": run_history.config_file(settings),
        "commands": run_history.commands(steps, settings, metrics),
        "times": run_history.times(steps, metrics, own),
        "digests": run_history.digests([*steps, own] if own else steps),
        "missing": missing,
        "elsewhere": run_history.made_elsewhere(metrics),
    }


# The headline


def headline_sentence(metrics: Metrics) -> str:
    """Return in one sentence how consistent and how accurate the models are, before and after, with noise floors."""
    names = list(metrics["models"])
    first, last = names[0], names[-1]
    noise = noise_clause(metrics, list(dict.fromkeys((first, last))))
    if len(names) == 1:
        shares = (("cr", "a CR of"), ("accuracy", "an accuracy of"))
        parts = [f"{text} {with_interval(metrics['models'][last][key])}" for key, text in shares]
        return f"{label(dict(metrics), last)} has {' and '.join(parts)}{noise}."
    return f"{moved_sentence(metrics, first, last)}{noise}."


def noise_clause(metrics: Metrics, names: Sequence[str]) -> str:
    """Return what CR one and the same wording gives under each of these models, "" where that wasn't asked."""
    clauses: list[str] = []
    told: list[str] = []
    size = ""
    for kind, how in (
        ("neighbours", "asked again"),
        ("temperature", f"sampled at temperature {metrics['noise_temperature']}"),
    ):
        floors = {name: metrics["models"][name]["noise"][kind] for name in names}
        known = [name for name in names if floors[name]["cr"] is not None]
        of = {name: "" if known == told else f" for {label(dict(metrics), name)}" for name in known}
        if known:
            told, size = known, figures.floor_size(floors[known[0]])
            clauses.append(f"{' and '.join(number(floors[name]['cr']) + of[name] for name in known)} {how}")
    return f"; the noise floor of CR (one wording, {size}) is {', '.join(clauses)}" if clauses else ""


def last_stage_sentence(metrics: Metrics) -> str:
    """Return what the last stage did by itself, "" where that isn't known or is what the headline says."""
    names = list(metrics["models"])
    pair = figures.main_pair(metrics)
    return "" if pair == (names[0], names[-1]) else f"{moved_sentence(metrics, *pair)}."


def moved_sentence(metrics: Metrics, before: str, after: str) -> str:
    """Return how consistency and accuracy moved from one model to another."""
    paired = _paired(metrics, before, after)
    parts = [
        _moved(name, metrics["models"][before][key], metrics["models"][after][key], paired.get(key))
        for key, name in (("cr", "consistency (CR)"), ("accuracy", "accuracy"))
    ]
    return f"From {label(dict(metrics), before)} to {label(dict(metrics), after)}, {', and '.join(parts)}"


def _paired(metrics: Metrics, before: str, after: str) -> dict[str, Mapping[str, Any]]:
    """Return the paired differences by metric; metrics.json has each pair in the order of the models."""
    found = {}
    for row in metrics["differences"]:
        if (row["a"], row["b"]) == (before, after):
            found[row["metric"]] = row
        elif (row["b"], row["a"]) == (before, after):
            low, high = (None if row[key] is None else -row[key] for key in ("high", "low"))
            found[row["metric"]] = row | {
                "mean": None if row["mean"] is None else -row["mean"],
                "low": low,
                "high": high,
            }
    return found


def _moved(name: str, before: dict[str, Any], after: dict[str, Any], paired: Mapping[str, Any] | None) -> str:
    if before["mean"] is None or after["mean"] is None or paired is None:
        return f"{name} can't be told (too few wordings a task)"
    change = f"{with_interval(before)} to {with_interval(after)}, by {with_interval(dict(paired), signed=True)}"
    if paired["low"] is None:
        return f"{name} went from {change} (too few tasks for an interval)"
    if paired["low"] > 0 or paired["high"] < 0:
        return f"{name} {'rose' if paired['low'] > 0 else 'fell'} from {change}"
    return f"{name} went from {change} (no change is shown: the interval holds 0)"


# Wordings


def hardest_wordings(metrics: Metrics) -> list[dict[str, Any]]:
    """Return the wordings whose accuracy under the last model is furthest below their task's mean over wordings."""
    name = list(metrics["models"])[-1]
    of_task: dict[str, list[float]] = {}
    for row in metrics["per_wording"]:
        of_task.setdefault(row["task"], []).append(row["models"][name]["accuracy"])
    rows = []
    for row in metrics["per_wording"]:
        values = of_task[row["task"]]
        mean = sum(values) / len(values)
        below = mean - row["models"][name]["accuracy"]
        if len(values) > 1 and below > 0:
            rows.append({**row, "text": shorten(row["text"], MAX_WORDING), "mean": mean, "below": below})
    return sorted(rows, key=lambda row: (-row["below"], row["task"]))[:NUM_HARDEST]


def extreme_wordings(metrics: Metrics) -> list[dict[str, Any]]:
    """Return each task's worst and best wording under the last model, the widest spread first."""
    name = list(metrics["models"])[-1]
    of_task: dict[str, list[tuple[float, str]]] = {}
    for row in metrics["per_wording"]:
        text = shorten(row["text"], MAX_WORDING)
        of_task.setdefault(row["task"], []).append((row["models"][name]["accuracy"], text))
    rows = []
    for task, found in of_task.items():
        worst, best = min(found), max(found)
        if best[0] > worst[0]:
            rows.append((worst[0] - best[0], task, worst, best))
    return [
        {"task": task, "worst": worst, "best": best, "spread": -spread}
        for spread, task, worst, best in sorted(rows)[: 2 * NUM_HARDEST]
    ]


# How the data fared


def step_title(step: StepRecord) -> str:
    """Return a heading for a step: its stage, and its round beyond the first."""
    names = {
        "sft": "Stage 1: fine-tuning on paraphrases",
        "judge": "Rewards",
        "rank": "Groups for stage 2",
        "align": "Stage 2: consistency alignment",
    }
    part = step.label.rpartition("/")[0]
    return names[step.name] + (f", {part.replace('round', 'round ')}" if part else "")


def data_stories(steps: Sequence[StepRecord]) -> dict[str, list[dict[str, Any]]]:
    """Return for each step before training what became of the data, a list of rounds."""
    return {
        "prepare": [
            {"counts": step.counts, "dropped": run_history.dropped_by_reason(step)}
            for step in run_history.of_step(steps, "prepare")
        ],
        "paraphrase": [
            {
                "counts": step.counts,
                "dropped": run_history.dropped_by_reason(step),
                "kept": run_history.kept_wordings(step),
            }
            for step in run_history.of_step(steps, "paraphrase")
        ],
        "judge": [
            {
                "title": step_title(step),
                "counts": step.counts,
                "quality": judge_rows(step.counts.get("calibration", {})),
                "own": run_history.own_answers(step),
                "figure": figures.reward_figure(step.counts, "Rewards by task"),
            }
            for step in run_history.of_step(steps, "judge")
        ],
        "rank": [
            {
                "title": step_title(step),
                "counts": step.counts,
                "figure": figures.size_figure(step.counts, "Group sizes"),
                "astray": [row for row in run_history.dropped_by_reason(step) if row["reason"] == ASTRAY],
            }
            for step in run_history.of_step(steps, "rank")
        ],
    }


def judge_rows(calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return how well the judge answered what is known: a row a question and a source of known answers."""
    sources = (("quality_dev", "dev inputs"), ("quality_audit", "align inputs (audit)"), ("quality", "together"))
    return [
        {"question": question, "source": source, **values[key]}
        for question, values in calibration.items()
        for key, source in sources
        if values.get(key) and (values[key]["num_yes"] or values[key]["num_no"])
    ]
