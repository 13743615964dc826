"""The inputs that a report shows one by one, and the kinds of failure: another answer, wrong type, cut off, empty.

What agrees has been settled before; knows no model and no file.

Shape suffixes: I inputs, W wordings.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from coalign.evaluation import metrics
from coalign.evaluation.grids import Grid, Scored
from coalign.evaluation.metrics import FloatArray, IntArray
from coalign.evaluation.metrics_rows import (
    AnswerKind,
    Case,
    CaseAnswer,
    CaseModel,
    Failures,
    KindCounts,
    Outcome,
    TaskFailures,
)
from coalign.records import Example, Response, Task
from coalign.runs.digests import digest_value
from coalign.text import AnswerForm, normalise_answer, unit_hash

NUM_CASES = 240
NUM_CHANGED = 80
NUM_INCONSISTENT = 80
MAX_INPUT, MAX_ANSWER = 1500, 400  # characters shown
OUTCOMES = get_args(Outcome)
KINDS: dict[AnswerKind, str] = {
    "right": "equals a gold answer in normal form",
    "another": "a whole answer that is none of the gold ones",
    "wrong_type": (
        "not the kind of answer that was asked for. It is told from the task's label set (the distinct answers of a"
        " task with few of them): an answer that is none of the labels. So is a label in the words of another wording."
        " A task without a label set has no wrong type: its wrong answers all count as another answer"
    ),
    "cut_off": "reached eval.max_new_tokens before it ended",
    "empty": "nothing but white space",
}

FailureKind = Literal["change", "inconsistent", "sample"]  # why an input is shown
Answers = Mapping[tuple[str, str, str], Response]


@dataclasses.dataclass(frozen=True, slots=True)
class ModelAnswers:
    """What is known of a model's answers: by grid the answers' numbers, by grid in CR its consistency columns."""

    answers: Answers
    scored: list[Scored]
    columns: dict[int, dict[str, FloatArray]]


def label_set(task: Task, example: Example) -> frozenset[str]:
    """Return the normal forms of all answers of the right type; empty where that isn't known."""
    if not task.labels:
        return frozenset()
    return frozenset(normalise_answer(text, task.answer_form) for text in (*task.labels, *example.outputs))


def answer_kind(answer: Response, correct: bool, labels: frozenset[str], form: AnswerForm = ()) -> AnswerKind:
    """Return which of KINDS an answer is."""
    if correct:
        return "right"
    if answer.finish != "stop":
        return "cut_off"
    if answer.canonical is None:
        return "wrong_type"
    key = metrics.answer_key(answer.canonical, answer.finish, form)
    if key is None:
        return "empty"
    return "wrong_type" if labels and key not in labels else "another"


def items_digest(grid: Grid) -> str:
    """Return a digest of the inputs, gold answers and wordings that a task was evaluated on.

    Two runs with the same digest can be compared by pairs.
    """
    return digest_value(
        [
            [example.input, list(example.outputs), sorted(grid.wordings[w].text for w in np.flatnonzero(present_W))]
            for example, present_W in sorted(
                zip(grid.examples, grid.present, strict=True), key=lambda pair: (pair[0].input, pair[0].outputs)
            )
        ]
    )


def count_failures(grids: Sequence[Grid], models: Mapping[str, ModelAnswers]) -> Failures:
    """Return how many answers are of each kind, by model and by task, with what the kinds mean."""
    totals: dict[str, Counter[AnswerKind]] = {name: Counter() for name in models}
    per_task = []
    for index, grid in enumerate(grids):
        of_models = {}
        for name, model in models.items():
            counts: Counter[AnswerKind] = Counter()
            for place, example in enumerate(grid.examples):
                counts.update(kind for _, kind in _answers_to(grid, place, example, model, index))
            totals[name] += counts
            of_models[name] = _kind_counts(counts)
        per_task.append(TaskFailures(task=grid.task.id, num_labels=len(grid.task.labels), models=of_models))
    return Failures(
        definitions={str(kind): text for kind, text in KINDS.items()},
        models={name: _kind_counts(counts) for name, counts in totals.items()},
        per_task=tuple(per_task),
    )


def _kind_counts(counts: Counter[AnswerKind]) -> KindCounts:
    return KindCounts(**{kind: counts[kind] for kind in KINDS})


def _answers_to(
    grid: Grid, row: int, example: Example, model: ModelAnswers, index: int
) -> Iterable[tuple[Response, AnswerKind]]:
    labels, form = label_set(grid.task, example), grid.task.answer_form
    for column in np.flatnonzero(grid.present[row]):
        answer = model.answers[grid.task.id, example.id, grid.wordings[column].id]
        yield answer, answer_kind(answer, bool(model.scored[index].correct[row, column]), labels, form)


def pick_cases(
    grids: Sequence[Grid], models: Mapping[str, ModelAnswers], min_wordings: int, agreeing: IntArray | None
) -> list[Case]:
    """Return up to NUM_CASES inputs with every model's answers to each wording.

    First those that changed most from the first model to the last (in CR plus in the share of right answers; inputs
    with a CR before others), then those on which the last model is least consistent, then others in hash order, one
    task after another.
    """
    ranked = _rank_inputs(grids, models, min_wordings)
    chosen: dict[tuple[int, int], FailureKind] = {}
    changed = sorted((one for one in ranked if one.change > 0), key=lambda one: (not one.in_cr, -one.change, one.order))
    unsteady = sorted((one for one in ranked if one.cr < 1.0), key=lambda one: (one.cr, one.mcr, one.order))
    of_task: Counter[int] = Counter()
    others = []
    for one in sorted(ranked, key=lambda one: one.order):
        others.append((of_task[one.grid], one))
        of_task[one.grid] += 1
    others.sort(key=lambda pair: (pair[0], pair[1].order))
    sources: tuple[tuple[FailureKind, list[_Ranked], int], ...] = (
        ("change", changed, NUM_CHANGED),
        ("inconsistent", unsteady, NUM_INCONSISTENT),
        ("sample", [one for _, one in others], NUM_CASES),
    )
    for why, found, limit in sources:
        for one in found[:limit]:
            if len(chosen) < NUM_CASES:
                chosen.setdefault((one.grid, one.row), why)
    change = {(one.grid, one.row): one.change for one in ranked}
    cases = []
    for (index, row), why in chosen.items():
        grid, moved = grids[index], round(change[index, row], 4)
        shown = _case_models(grid, index, row, models, agreeing, min_wordings)
        cases.append(_case(grid, row, shown, why, moved))
    return cases


@dataclasses.dataclass(frozen=True, slots=True)
class _Ranked:
    grid: int
    row: int
    change: float
    cr: float
    mcr: float
    order: float
    in_cr: bool


def _rank_inputs(grids: Sequence[Grid], models: Mapping[str, ModelAnswers], min_wordings: int) -> list[_Ranked]:
    """Return every input with how much it changed and how consistent the last model is (1 where it has no CR)."""
    first, *_, last = [*models.values(), *models.values()]
    ranked = []
    for index, grid in enumerate(grids):
        right = [metrics.mean_over_wordings(model.scored[index].correct, grid.present) for model in (first, last)]
        enough_I = grid.eligible(min_wordings)
        change_I = np.abs(right[1] - right[0])
        cr_I, mcr_I = np.ones(len(grid.examples)), np.ones(len(grid.examples))
        if index in last.columns:
            cr_I[enough_I], mcr_I[enough_I] = last.columns[index]["cr"], last.columns[index]["mcr"]
            change_I[enough_I] += np.abs(last.columns[index]["cr"] - first.columns[index]["cr"])
        for row, example in enumerate(grid.examples):
            order = unit_hash("inconsistent", grid.task.id, example.id)
            ranked.append(
                _Ranked(
                    index, row, float(change_I[row]), float(cr_I[row]), float(mcr_I[row]), order, bool(enough_I[row])
                )
            )
    return ranked


def _case(grid: Grid, row: int, models: dict[str, CaseModel], chosen: FailureKind, change: float) -> Case:
    example = grid.examples[row]
    return Case(
        task=grid.task.id,
        example=example.id,
        input=cut(example.input, MAX_INPUT),
        golds=tuple(cut(gold, MAX_ANSWER) for gold in example.outputs),
        wordings=tuple(grid.wordings[column].id for column in np.flatnonzero(grid.present[row])),
        models=models,
        chosen=chosen,
        change=change,
    )


def _case_models(
    grid: Grid, index: int, row: int, models: Mapping[str, ModelAnswers], agreeing: IntArray | None, min_wordings: int
) -> dict[str, CaseModel]:
    example = grid.examples[row]
    columns = np.flatnonzero(grid.present[row])
    place = int(grid.eligible(min_wordings)[:row].sum())  # of this input among those that enter CR
    in_cr, form = bool(grid.eligible(min_wordings)[row]), grid.task.answer_form
    letters: dict[int, int] = {}
    shown = {}
    for name, model in models.items():
        clusters = cluster_numbers(model.scored[index].codes[row, columns], agreeing, letters)
        values = {key: float(v[place]) for key, v in model.columns[index].items()} if in_cr else {}
        shown[name] = CaseModel(
            cr=values.get("cr"),
            mcr=values.get("mcr"),
            outcome=next((key for key in OUTCOMES if values.get(key)), None),
            num_right=int(model.scored[index].correct[row, columns].sum()),
            answers=tuple(
                CaseAnswer(
                    text=cut(answer.text, MAX_ANSWER),
                    canonical=_mapped(answer, form),
                    kind=kind,
                    cluster=cluster,
                )
                for (answer, kind), cluster in zip(_answers_to(grid, row, example, model, index), clusters, strict=True)
            ),
        )
    return shown


def _mapped(answer: Response, form: AnswerForm) -> str | None:
    """Return the canonical words of an answer where they are others than it was given in."""
    said = answer.canonical
    if said is None or normalise_answer(said, form) == normalise_answer(answer.text, form):
        return None
    return cut(said, MAX_ANSWER)


def cluster_numbers(codes_W: IntArray, agreeing: IntArray | None, known: dict[int, int]) -> list[int | None]:
    """Return for each answer the number of the answers it agrees with, None for one that agrees with nothing.

    Clusters are those of MCR: each answer joins the first one whose first member it agrees with. `known` holds the
    numbers that codes got for the models before and is added to, so that the same answer keeps its number.
    """
    agree_WW = metrics.agreement_matrix(codes_W[None, :], agreeing)[0]
    leaders: dict[int, list[int]] = defaultdict(list)
    for place in range(len(codes_W)):
        if agree_WW[place, place]:
            leaders[next((k for k in leaders if agree_WW[k, place]), place)].append(place)
    numbers: list[int | None] = [None] * len(codes_W)
    used: set[int] = set()
    for members in leaders.values():
        codes = [int(codes_W[place]) for place in members]
        free = [known[code] for code in codes if code in known and known[code] not in used]
        number = free[0] if free else 1 + max((*known.values(), *used), default=-1)
        used.add(number)
        for place, code in zip(members, codes, strict=True):
            numbers[place] = number
            known.setdefault(code, number)
    return numbers


def cut(text: str, limit: int) -> str:
    """Return a text with at most `limit` characters, and how many more there were."""
    return text if len(text) <= limit else f"{text[:limit]}… (+{len(text) - limit} characters)"
