"""The run as one HTML page without links: headline, tasks, wordings, inputs one by one, failures, data, training.

Used by launch/eval.py and launch/report.py. Everything comes from metrics.json and from what the run's steps have left
on disk; a part that has no data is left out. Knows no model and computes nothing that would change a result.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from coalign import charts, figures, history
from coalign.artifacts import TRAINING_STEPS, write_atomic, write_json
from coalign.history import Step
from coalign.report import (
    HEADLINE,
    METRICS,
    MORE,
    REPORT,
    SETS,
    constant_sentence,
    differences_of,
    estimates_of,
    label,
    number,
    shorten,
    task_sets,
    text_report,
    with_interval,
)

MAX_BYTES = 2_000_000
SCALES = (1.0, 0.6, 0.35, 0.2, 0.1, 0.05, 0.02)  # of the rows below, taken until the page is small enough
MAX_TASKS, MAX_WORDINGS = 400, 1200
NUM_HARDEST = 12
MAX_WORDING = 240  # characters
OUTCOME_LETTERS = {"always_right": "r", "always_wrong_alike": "w", "inconsistent": "i", "mixed": "m", None: "n"}
OUTCOME_NAMES = {
    "r": "always right",
    "w": "always wrong alike",
    "i": "inconsistent",
    "m": "agree, some right",
    "n": "too few wordings",
}

Metrics = Mapping[str, Any]
_TEMPLATES = Path(__file__).parent / "templates"
_WORD = re.compile(r"\s*\S+\s*")  # blanks go with words: alone they would all match each other


def write_results(folder: Path, metrics: dict[str, Any]) -> list[str]:
    """Write metrics.json and the page into an eval folder and return everything that eval prints."""
    write_json(folder / METRICS, metrics)
    return [*text_report(metrics), "", f"report: {write_page(folder, metrics)}"]


def write_page(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write the page into an eval folder and return its path."""
    steps, missing = history.find_steps(folder, metrics)
    path = folder / REPORT
    write_atomic(path, render_page(metrics, steps, missing))
    return path


def render_page(metrics: dict[str, Any], steps: Sequence[Step] = (), missing: Sequence[str] = ()) -> str:
    """Return the page: one file of at most MAX_BYTES, no network, every text escaped.

    Of a large run it shows fewer inputs, tasks and wordings, and says how many of how many.
    """
    template = environment().get_template("report.html.j2")
    values = page_values(metrics, steps, missing)
    page = ""
    for scale in SCALES:
        page = template.render(
            **values,
            cases=scaled_cases(values["all_cases"], scale),
            tasks=metrics["per_task"][: max(1, int(MAX_TASKS * scale))],
            wordings=metrics["per_wording"][: max(1, int(MAX_WORDINGS * scale))],
        )
        if len(page.encode()) <= MAX_BYTES:
            break
    return page


def scaled_cases(cases: Sequence[dict[str, Any]], scale: float) -> list[dict[str, Any]]:
    """Return a share of the inputs: of each kind that was chosen, the first of them."""
    kinds = Counter(case["chosen"] for case in cases)
    left = {kind: max(1, int(count * scale)) for kind, count in kinds.items()}
    shown = []
    for case in cases:
        left[case["chosen"]] -= 1
        if left[case["chosen"]] >= 0:
            shown.append(case)
    return shown


def chosen_words(cases: Sequence[Mapping[str, Any]], first: str, last: str) -> str:
    """Return which inputs are shown one by one, in order, as far as there are any of a kind."""
    kinds = {case["chosen"] for case in cases}
    words = {
        "change": f"those that changed most from {first} to {last}",
        "inconsistent": f"those on which {last} is least consistent",
        "sample": "others in hash order, a task after another",
    }
    return ", then ".join(text for kind, text in words.items() if kind in kinds)


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


def page_values(metrics: dict[str, Any], steps: Sequence[Step], missing: Sequence[str]) -> dict[str, Any]:
    """Return everything that the template shows, pictures drawn."""
    settings = history.changed_settings(steps, metrics)
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
        "config_file": history.config_file(settings),
        "commands": history.commands(steps, settings, metrics),
        "times": history.times(steps, metrics),
        "digests": history.digests(steps),
        "missing": missing,
        "elsewhere": history.made_elsewhere(metrics),
    }


# The headline


def headline_sentence(metrics: Metrics) -> str:
    """Return in one sentence how consistent and how accurate the models are, before and after, with noise floors."""
    names = list(metrics["models"])
    first, last = names[0], names[-1]
    model = metrics["models"][last]
    floors = [
        f"{text} gives CR {number(model['noise'][kind]['cr'])}"
        for kind, text in (
            ("neighbours", "one wording asked again"),
            ("temperature", f"one wording sampled at temperature {metrics['noise_temperature']}"),
        )
        if model["noise"][kind]["cr"] is not None
    ]
    noise = f"; {' and '.join(floors)}" if floors else ""
    if len(names) == 1:
        shares = (("cr", "a CR of"), ("accuracy", "an accuracy of"))
        parts = [f"{text} {with_interval(model[key])}" for key, text in shares]
        return f"{label(dict(metrics), last)} has {' and '.join(parts)}{noise}."
    return f"{moved_sentence(metrics, first, last)}{noise}."


def last_stage_sentence(metrics: Metrics) -> str:
    """Return what the last stage did by itself, "" where that isn't known or is what the headline says."""
    names = list(metrics["models"])
    pair = figures.main_pair(metrics)
    return "" if pair == (names[0], names[-1]) else f"{moved_sentence(metrics, *pair)}."


def moved_sentence(metrics: Metrics, before: str, after: str) -> str:
    """Return how consistency and accuracy moved from one model to another."""
    paired = _paired(metrics, before, after)
    parts = [
        _moved(name, metrics["models"][before][key]["mean"], metrics["models"][after][key]["mean"], paired.get(key))
        for key, name in (("cr", "consistency (CR)"), ("accuracy", "accuracy"))
    ]
    return f"From {label(dict(metrics), before)} to {label(dict(metrics), after)}, {' and '.join(parts)}"


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


def _moved(name: str, before: float | None, after: float | None, paired: Mapping[str, Any] | None) -> str:
    if before is None or after is None or paired is None:
        return f"{name} can't be told (too few wordings a task)"
    change = f"{number(before)} to {number(after)}, by {with_interval(dict(paired), signed=True)}"
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


# The inputs one by one


def case_values(metrics: Metrics) -> list[dict[str, Any]]:
    """Return the inputs as the page shows them: a row a wording, a cell a model, differences marked."""
    texts = {(row["task"], row["wording"]): shorten(row["text"], MAX_WORDING) for row in metrics["per_wording"]}
    found = []
    for case in metrics.get("cases", []):
        models = list(case["models"].values())
        usual = [_usual_answer(model["answers"]) for model in models]
        rows = []
        for place, wording in enumerate(case["wordings"]):
            cells = []
            for index, model in enumerate(models):
                answer = model["answers"][place]
                before = models[index - 1]["answers"][place] if index else answer
                cells.append(
                    {
                        **answer,
                        "letter": letter_of(answer["cluster"]),
                        "pieces": differences(answer["text"], usual[index], answer["cluster"] is None),
                        "changed": (answer["cluster"], answer["kind"]) != (before["cluster"], before["kind"]),
                    }
                )
            rows.append({"text": texts[case["task"], wording], "cells": cells})
        found.append(
            {
                **case,
                "rows": rows,
                "first": models[0],
                "last": models[-1],
                "outcomes": "".join(OUTCOME_LETTERS[model["outcome"]] for model in models),
            }
        )
    return found


def _usual_answer(answers: Sequence[Mapping[str, Any]]) -> tuple[int | None, str]:
    """Return the number and the text of the answer that most wordings got; (None, "") where none agrees."""
    counts = Counter(answer["cluster"] for answer in answers if answer["cluster"] is not None)
    if not counts:
        return None, ""
    cluster = max(counts, key=lambda number: (counts[number], -number))
    return cluster, next(answer["text"] for answer in answers if answer["cluster"] == cluster)


def letter_of(cluster: int | None) -> str:
    """Return the mark of an answer: the same letter for answers that agree, a dash for one that agrees with nothing."""
    if cluster is None:
        return "–"
    return chr(ord("A") + cluster % 26) + (str(cluster // 26) if cluster >= 26 else "")


def differences(text: str, usual: tuple[int | None, str], silent: bool) -> list[tuple[str, bool]]:
    """Return a text in pieces, each with whether it differs from the usual answer, word by word."""
    if not text or silent or usual[0] is None:
        return [(text, False)]
    words, others = _WORD.findall(text), _WORD.findall(usual[1])
    bare, others = [word.strip() for word in words], [word.strip() for word in others]
    matcher = difflib.SequenceMatcher(None, bare, others, autojunk=False)
    pieces = [
        ("".join(words[start:end]), what != "equal") for what, start, end, _, _ in matcher.get_opcodes() if start < end
    ]
    return pieces or [(text, False)]


# How the data fared


def step_title(step: Step) -> str:
    """Return a heading for a step: its stage, and its round beyond the first."""
    names = {
        "sft": "Stage 1: fine-tuning on paraphrases",
        "judge": "Rewards",
        "rank": "Groups for stage 2",
        "align": "Stage 2: consistency alignment",
    }
    part = step.label.rpartition("/")[0]
    return names[step.name] + (f", {part.replace('round', 'round ')}" if part else "")


def data_stories(steps: Sequence[Step]) -> dict[str, list[dict[str, Any]]]:
    """Return for each step before training what became of the data, a list of rounds."""
    return {
        "prepare": [
            {"counts": step.counts, "dropped": history.dropped_by_reason(step)}
            for step in history.of_step(steps, "prepare")
        ],
        "paraphrase": [
            {
                "counts": step.counts,
                "dropped": history.dropped_by_reason(step),
                "kept": history.kept_wordings(step),
            }
            for step in history.of_step(steps, "paraphrase")
        ],
        "judge": [
            {
                "title": step_title(step),
                "counts": step.counts,
                "quality": judge_rows(step.counts.get("calibration", {})),
                "figure": figures.reward_figure(step.counts, "Rewards by task"),
            }
            for step in history.of_step(steps, "judge")
        ],
        "rank": [
            {
                "title": step_title(step),
                "counts": step.counts,
                "figure": figures.size_figure(step.counts, "Group sizes"),
            }
            for step in history.of_step(steps, "rank")
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
