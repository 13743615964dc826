"""The results of an evaluation in model cards: tables in the text, numbers in the Hub's metadata.

Used by launch/eval.py and launch/ladder.py. Knows metrics.json and no model.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from coalign.config import EvalTable
from coalign.report.model_cards import BEGIN, END, STEPS_TO, assemble, placeless
from coalign.runs.atomic_files import write_atomic
from coalign.runs.digests import CARD
from coalign.runs.run_folder import RunFolder

logger = logging.getLogger("coalign")

METRICS = {"accuracy": "accuracy", "cr": "CR", "corrected_cr": "corrected CR", "mcr": "MCR"}
SETS = {"": "all tasks", "seen": "tasks seen in training", "unseen": "unseen tasks"}
UNSEEN = " under wordings that no training step has seen"


def add_results(run: RunFolder, table: EvalTable, metrics: dict[str, Any]) -> None:
    """Write the results into the cards of the models that this run has made itself.

    A measurement that is written elsewhere (eval.folder) is no result of the run, and borrowed steps, the base model
    and other folders are not ours to write to.
    """
    if table.folder:
        return
    for name, value in table.models.items():
        card = run.step(value) / "model" / CARD if value in STEPS_TO and value not in run.run.inputs else None
        if card is not None and card.resolve().is_relative_to(run.path.resolve()):
            fill_card(card, metrics, name)


def fill_card(card: Path, metrics: dict[str, Any], name: str) -> None:
    """Write the results of an evaluation into `name`'s card, if it is there; a failure is only warned of."""
    from yaml import YAMLError

    if not card.is_file():
        return
    try:
        text = card.read_text(encoding="utf-8")
        filled = with_results(text, metrics, name)
        if filled != text:  # a card that says it already keeps its time
            write_atomic(card, filled)
    except (OSError, ValueError, YAMLError) as error:  # somebody may have edited it
        logger.warning("the results could not be written into %s: %s", card, " ".join(str(error).split()))


def with_results(text: str, metrics: dict[str, Any], name: str) -> str:
    """Return a card with the results of an evaluation: in the text those of every model, in the metadata `name`'s.

    A card whose marks were taken out keeps its text.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    dataset = card.data.get("datasets") or [metrics["run"]]
    wordings = _given_wordings(metrics)
    options = {
        "task_type": "text-generation",
        "dataset_type": dataset[0],
        "dataset_name": f"held-out inputs{'' if wordings else ' and wordings'} of {', '.join(dataset)}{wordings}",
        "dataset_split": metrics["split"],
    }
    estimates = {metric: metrics["models"][name][metric] for metric in METRICS}
    card.data.model_name = card.text.strip().partition("\n")[0].removeprefix("# ")
    card.data.eval_results = [
        EvalResult(
            **options,
            metric_type=metric,
            metric_name=METRICS[metric],
            metric_value=round(found["mean"], 4),
            metric_args={key: _rounded(found[key]) for key in ("low", "high", "num_tasks")},
        )
        for metric, found in estimates.items()
        if found["mean"] is not None
    ] or None
    before, begin, rest = card.text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        card.text = "\n".join([before + begin, *results_lines(metrics, name), end + after])
    return assemble(card.data.to_yaml(), card.text)


def results_lines(metrics: dict[str, Any], name: str) -> list[str]:
    """Return the tables of results: every model, and how the one of this card differs from those before it."""
    labels = {key: placeless(metrics.get("labels", {}).get(key, key)) for key in metrics["models"]}
    both = 0 < metrics["num_seen_tasks"] < metrics["num_tasks"]
    lines = []
    for which, words in SETS.items() if both else [("", SETS[""])]:
        lines += ["", f"| {words} | {' | '.join(METRICS.values())} |", f"|---|{'---|' * len(METRICS)}"]
        for key, model in metrics["models"].items():
            label = f"**{labels[key]}** (this model)" if key == name else labels[key]
            lines.append(_row(label, model[which] if which else model))
        for first in metrics["models"]:
            rows = metrics[f"differences_{which}" if which else "differences"]
            found = {row["metric"]: row for row in rows if (row["a"], row["b"]) == (first, name)}
            if found:
                lines.append(_row(f"{labels[name]} minus {labels[first]}", found, signed=True))
    one = metrics["models"][name]
    method = {"bootstrap": "a two-level bootstrap over tasks and inputs", "t": "Student's t over tasks"}
    kind = method.get(one["accuracy"]["method"])
    return [
        *lines,
        "",
        f"Greedy answers to {metrics['num_inputs']} {metrics['split']} inputs of {metrics['num_tasks']} tasks"
        f" ({metrics['num_tasks_in_cr']} of them in CR){_given_wordings(metrics) or UNSEEN}. Means over the inputs of a"
        " task, then over tasks; "
        + (f"in brackets 95 % intervals by {kind}." if kind else "too few tasks for intervals.")
        + " A difference whose interval contains 0 shows nothing.",
        "",
        f"CR is the share of pairs of wordings whose answers agree ({placeless(metrics['agreement'])}), corrected CR"
        " takes off what independent answers with the task's own frequencies would reach, MCR is the share of wordings"
        " in the largest agreeing group, accuracy is exact match after normalising.",
    ]


def _given_wordings(metrics: dict[str, Any]) -> str:
    """Return words for a file of wordings that was evaluated under in the place of the held-out ones; "" without."""
    file = metrics.get("settings", {}).get("eval.wordings_file", "")
    return f" under the wordings of {Path(file).name}" if file else ""


def _row(label: str, estimates: dict[str, Any], signed: bool = False) -> str:
    return f"| {label} | {' | '.join(_cell(estimates.get(metric), signed) for metric in METRICS)} |"


def _cell(found: dict[str, Any] | None, signed: bool) -> str:
    if found is None or found["mean"] is None:
        return "–"
    form = "{:+.3f}" if signed else "{:.3f}"
    interval = "" if found["low"] is None else f" [{form.format(found['low'])}, {form.format(found['high'])}]"
    return form.format(found["mean"]) + interval


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
