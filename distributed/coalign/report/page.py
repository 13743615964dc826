"""The run as one HTML page without links: headline, tasks, wordings, inputs one by one, failures, data, training.

Everything comes from metrics.json and from what the run's steps have left
on disk; a part that has no data is left out. Knows no model and computes nothing that would change a result.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from coalign.evaluation.metrics_file import write_metrics
from coalign.evaluation.metrics_schema import Metrics
from coalign.report import figures, run_history, svg
from coalign.report.case_tables import OUTCOME_NAMES, ShownCase, case_values, chosen_words, scaled_cases
from coalign.report.data_stories import data_stories, step_title
from coalign.report.formatting import (
    HEADLINE,
    MORE,
    REPORT,
    SET_NAMES,
    number,
    paired_rows,
    shorten,
    shown_sets,
    with_interval,
)
from coalign.report.run_history import StepRecord
from coalign.report.sentences import constant_sentence, headline_sentence, judge_sentence, last_stage_sentence
from coalign.report.terminal import text_report
from coalign.report.wording_tables import hardest_wordings, wording_ranges
from coalign.runs.atomic_files import write_atomic
from coalign.steps import TRAINING_STEPS

MAX_BYTES = 2_000_000
SCALES = (1.0, 0.6, 0.35, 0.2, 0.1, 0.05, 0.02)  # of the rows below, taken until the page is small enough
MAX_TASKS, MAX_WORDINGS = 400, 1200

_TEMPLATES = Path(__file__).parent / "templates"


def write_results(folder: Path, metrics: Metrics) -> list[str]:
    """Write metrics.json and the page into an eval folder and return everything that eval prints."""
    write_metrics(folder, metrics)
    return [*text_report(metrics), "", f"report: {write_page(folder, metrics)}"]


def write_page(folder: Path, metrics: Metrics) -> Path:
    """Write the page into an eval folder and return its path."""
    steps, missing = run_history.find_steps(folder, metrics)
    path = folder / REPORT
    write_atomic(path, render_page(metrics, steps, missing, run_history.own_step(folder)))
    return path


def render_page(
    metrics: Metrics,
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


def less_and_less(metrics: Metrics, cases: Sequence[ShownCase]) -> Iterator[dict[str, Any]]:
    """Yield what the page shows, of a large run ever less: fewer rows, then result and record, then one sentence."""
    for scale in SCALES:
        yield {
            "detail": "all",
            "cases": scaled_cases(cases, scale),
            "tasks": metrics.per_task[: max(1, int(MAX_TASKS * scale))],
            "wordings": metrics.per_wording[: max(1, int(MAX_WORDINGS * scale))],
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
        "picture": lambda picture: Markup(picture.replace(svg.OWN, f"p{next(numbers)}")),
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
    metrics: Metrics, steps: Sequence[StepRecord], missing: Sequence[str], own: StepRecord | None
) -> dict[str, Any]:
    """Return everything that the template shows, pictures drawn."""
    settings = run_history.changed_settings(steps, metrics)
    names = list(metrics.models)
    return {
        "metrics": metrics,
        "judge": judge_sentence(metrics),
        "models": names,
        "labels": {name: metrics.label(name) for name in names},
        "headline": HEADLINE,
        "more": MORE,
        "sets": {which: SET_NAMES[which] for which in shown_sets(metrics)},
        "differences": lambda which: paired_rows(metrics, which),
        "sentence": headline_sentence(metrics),
        "wordings_file": metrics.settings.get("eval.wordings_file", ""),
        "last_stage": last_stage_sentence(metrics),
        "constant": constant_sentence(metrics),
        "headline_figures": figures.headline_figures(metrics),
        "outcomes": figures.outcome_figure(metrics),
        "task_figures": figures.task_figures(metrics),
        "wording_figures": figures.wording_figures(metrics),
        "hardest": hardest_wordings(metrics),
        "extremes": wording_ranges(metrics),
        "failure_figure": figures.failure_figure(metrics),
        "kinds": {key: name for key, (name, _) in figures.KIND_PARTS.items()},
        "all_cases": case_values(metrics),
        "outcome_names": OUTCOME_NAMES,
        "chosen": chosen_words(metrics.cases, metrics.label(names[0]), metrics.label(names[-1])),
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
