"""The results of an evaluation in model cards: tables in the text, numbers in the Hub's metadata.

Knows metrics.json and no model.
"""

from __future__ import annotations

import logging
from pathlib import Path

from coalign.config import EvalTable
from coalign.display import from_markdown, markdown
from coalign.evaluation.metrics_schema import Estimate, Metrics
from coalign.report.formatting import SET_NAMES, names_of, paired_rows, shown_sets, with_interval
from coalign.report.model_cards import BEGIN, END, STEPS_TO, assemble, placeless
from coalign.report.sentences import judge_sentence
from coalign.runs.atomic_files import write_atomic
from coalign.runs.digests import CARD
from coalign.runs.run_folder import RunFolder

logger = logging.getLogger("coalign")

COLUMNS = names_of("accuracy", "cr", "corrected_cr", "mcr")
CARD_SETS = SET_NAMES | {"seen": "tasks seen in training"}
UNSEEN = " under wordings that no training step has seen"


def add_results(run: RunFolder, table: EvalTable, metrics: Metrics) -> None:
    """Write the results into the cards of the models that this run has made itself.

    An eval that writes elsewhere (eval.folder) is no result of the run. Borrowed steps, the base model and other
    folders are not ours to write to.
    """
    if table.folder:
        return
    for name, value in table.models.items():
        card = run.step(value) / "model" / CARD if value in STEPS_TO and value not in run.run.inputs else None
        if card is not None and card.resolve().is_relative_to(run.path.resolve()):
            fill_card(card, metrics, name)


def fill_card(card: Path, metrics: Metrics, name: str) -> None:
    """Write the results of an evaluation into `name`'s card, if it is there; a failure is only warned of."""
    from yaml import YAMLError

    if not card.is_file():
        return
    try:
        text = card.read_text(encoding="utf-8")
        filled = with_results(text, metrics, name)
        if filled != text:  # a card that says it already keeps its time
            write_atomic(card, filled)
    except (OSError, ValueError, YAMLError) as error:  # a person may have edited it
        logger.warning("the results could not be written into %s: %s", card, " ".join(str(error).split()))


def with_results(text: str, metrics: Metrics, name: str) -> str:
    """Return a card with the results of an evaluation: in the text those of every model, in the metadata `name`'s.

    A card whose marks were taken out keeps its text.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    dataset = card.data.get("datasets") or [metrics.run]
    wordings = _given_wordings(metrics)
    options = {
        "task_type": "text-generation",
        "dataset_type": dataset[0],
        "dataset_name": f"held-out inputs{'' if wordings else ' and wordings'} of {', '.join(dataset)}{wordings}",
        "dataset_split": metrics.split,
    }
    estimates = {metric: metrics.models[name].all.of(metric) for metric in COLUMNS}
    card.data.model_name = from_markdown(card.text.strip().partition("\n")[0].removeprefix("# "))
    card.data.eval_results = [
        EvalResult(
            **options,
            metric_type=metric,
            metric_name=COLUMNS[metric],
            metric_value=round(found.mean, 4),
            metric_args={"low": _rounded(found.low), "high": _rounded(found.high), "num_tasks": found.num_tasks},
        )
        for metric, found in estimates.items()
        if found.mean is not None
    ] or None
    before, begin, rest = card.text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        card.text = "\n".join([before + begin, *results_lines(metrics, name), end + after])
    return assemble(card.data.to_yaml(), card.text)


def results_lines(metrics: Metrics, name: str) -> list[str]:
    """Return the tables of results: every model, and how the one of this card differs from those before it."""
    labels = {key: markdown(placeless(metrics.label(key))) for key in metrics.models}
    lines = []
    for which in shown_sets(metrics):
        lines += ["", f"| {CARD_SETS[which]} | {' | '.join(COLUMNS.values())} |", f"|---|{'---|' * len(COLUMNS)}"]
        for key, model in metrics.models.items():
            label = f"**{labels[key]}** (this model)" if key == name else labels[key]
            lines.append(_row(label, {metric: model.over(which).of(metric) for metric in COLUMNS}))
        found = {row.a: row.estimates for row in paired_rows(metrics, which) if row.b == name}
        lines += [
            _row(f"{labels[name]} minus {labels[first]}", found[first], signed=True)
            for first in metrics.models
            if first in found
        ]
    method = {"bootstrap": "a two-level bootstrap over tasks and inputs", "t": "Student's t over tasks"}
    kind = method.get(metrics.models[name].all.accuracy.method)
    return [
        *lines,
        "",
        f"Greedy answers to {metrics.num_inputs} {metrics.split} inputs of {metrics.num_tasks} tasks"
        f" ({metrics.num_tasks_in_cr} of them in CR){markdown(_given_wordings(metrics)) or UNSEEN}. Means over the"
        " inputs of a task, then over tasks; "
        + (f"in brackets 95 % intervals by {kind}." if kind else "too few tasks for intervals.")
        + " A difference whose interval contains 0 shows nothing.",
        "",
        f"CR is the share of pairs of wordings whose answers agree ({markdown(placeless(metrics.agreement))}),"
        " corrected CR takes off what independent answers with the task's own frequencies would reach, MCR is the share"
        " of wordings in the largest agreeing group, accuracy is exact match after normalising."
        + (f" {judge_sentence(metrics)}" if metrics.agreement_judge else ""),
    ]


def _given_wordings(metrics: Metrics) -> str:
    """Return words for a file of wordings that was evaluated under in the place of the held-out ones; "" without."""
    file = metrics.settings.get("eval.wordings_file", "")
    return f" under the wordings of {Path(file).name}" if file else ""


def _row(label: str, estimates: dict[str, Estimate], signed: bool = False) -> str:
    cells = [with_interval(estimates.get(metric), signed=signed) for metric in COLUMNS]
    return f"| {label} | {' | '.join(cells)} |"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
