"""From responses to numbers by input: grids of inputs and wordings, answer codes, correctness, agreement, columns.

Pairs of input and wording that some model has not answered are left out, so that all arms are compared on the same
pairs. Knows no model and no file.

Shape suffixes: I inputs, W wordings or repeats, B weightings, M columns (models times metrics).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coalign.evaluation import metrics
from coalign.evaluation.intervals import SHARE, TaskSample, estimate
from coalign.evaluation.metrics import ABSENT, SILENT, BoolArray, Decide, FloatArray, IntArray
from coalign.evaluation.metrics_schema import ConstantAnswer
from coalign.evaluation.requests import ModelOutput
from coalign.records import Example, Response, Task, Wording
from coalign.text import AnswerForm, normalise_answer
from coalign.wordings.asking import Pair

CONSISTENCY = (
    "cr",
    "mcr",
    "corrected_cr",
    "expected_cr",
    "always_right",
    "always_wrong_alike",
    "inconsistent",
    "mixed",
)
ANSWERS = ("accuracy", "rouge_l", "rouge_1", "worst_wording", "spread")
# More extreme in a resample of few inputs than in all of them: their intervals are over the tasks alone.
EXTREMES = ("worst_wording", "spread")


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """A task's inputs and wordings; `present` (I, W) marks the pairs that every model has answered."""

    task: Task
    examples: list[Example]
    wordings: list[Wording]
    present: BoolArray

    def eligible(self, min_wordings: int) -> BoolArray:
        """Return which inputs enter CR."""
        enough_I: BoolArray = self.present.sum(axis=1) >= min_wordings
        return enough_I


@dataclasses.dataclass(frozen=True, slots=True)
class Scored:
    """One model's answers to a grid, each array (I, W)."""

    codes: IntArray
    correct: BoolArray
    rouge_1: FloatArray
    rouge_l: FloatArray


class Vocabulary:
    """Integer codes for the normal forms of answers."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def code(self, key: str | None) -> int:
        """Return the code of a normal form, SILENT for None."""
        return SILENT if key is None else self._codes.setdefault(key, len(self._codes))

    def texts(self, keys: IntArray) -> list[tuple[str, str]]:
        """Return the two normal forms of each pair key."""
        known = list(self._codes)
        return [(known[int(key) >> 32], known[int(key) & 0xFFFFFFFF]) for key in keys]


def by_key(responses: Sequence[Response]) -> dict[tuple[str, str, str], Response]:
    """Return the responses by (task, example, wording)."""
    return {(r.task, r.example, r.wording): r for r in responses}


def build_grids(
    tasks: Sequence[Task], pairs: Sequence[Pair], outputs: dict[str, ModelOutput]
) -> tuple[list[Grid], list[dict[str, Any]]]:
    """Return a grid for each task that has answers, and the pairs dropped since some model couldn't answer them."""
    answered = [by_key(output.answers) for output in outputs.values()]
    by_task: dict[str, list[Pair]] = defaultdict(list)
    dropped = []
    for pair in pairs:
        having = sum(pair.key in keys for keys in answered)
        if having == len(answered):
            by_task[pair.example.task].append(pair)
        elif having:
            dropped.append(
                {"reason": "not_every_model"} | dict(zip(("task", "example", "wording"), pair.key, strict=True))
            )
    grids = []
    for task in tasks:
        if not by_task[task.id]:
            continue
        examples = list({pair.example.id: pair.example for pair in by_task[task.id]}.values())
        wordings = list({pair.wording.id: pair.wording for pair in by_task[task.id]}.values())
        row = {example.id: index for index, example in enumerate(examples)}
        column = {wording.id: index for index, wording in enumerate(wordings)}
        present_IW = np.zeros((len(examples), len(wordings)), bool)
        for pair in by_task[task.id]:
            present_IW[row[pair.example.id], column[pair.wording.id]] = True
        grids.append(Grid(task, examples, wordings, present_IW))
    return grids, dropped


def score_answers(grid: Grid, answers: dict[tuple[str, str, str], Response], vocabulary: Vocabulary) -> Scored:
    """Return codes, correctness and ROUGE of a model's answers (by task, example, wording) to a grid."""
    shape = grid.present.shape
    scored = Scored(np.full(shape, ABSENT, np.int64), np.zeros(shape, bool), np.zeros(shape), np.zeros(shape))
    form = grid.task.answer_form
    for row, example in enumerate(grid.examples):
        rouge = functools.cache(functools.partial(metrics.rouge, references=example.outputs, form=form))
        for column in np.flatnonzero(grid.present[row]):
            answer = answers[grid.task.id, example.id, grid.wordings[column].id]
            key = metrics.answer_key(answer.canonical, answer.finish, form)
            scored.codes[row, column] = vocabulary.code(key)
            scored.correct[row, column] = metrics.is_correct(key, example.outputs, form)
            scored.rouge_1[row, column], scored.rouge_l[row, column] = rouge(answer.canonical)
    return scored


def repeat_codes(
    responses: Sequence[Response], vocabulary: Vocabulary, forms: Mapping[str, AnswerForm]
) -> dict[str, IntArray]:
    """Return codes_IW by task of repeated answers to one wording: a row per input, a column per repeat.

    `forms` holds what counts when answers are compared, by task; a task that it lacks has none of it.
    """
    found: dict[str, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for response in responses:
        key = metrics.answer_key(response.canonical, response.finish, forms.get(response.task, ()))
        found[response.task][response.example][response.sample] = vocabulary.code(key)
    width = 1 + max((response.sample for response in responses), default=0)
    return {
        task: np.array([[row.get(column, ABSENT) for column in range(width)] for row in rows.values()], np.int64)
        for task, rows in found.items()
    }


def agreeing_pairs(
    matrices: Sequence[IntArray],
    expected: Sequence[metrics.ExpectedAgreement],
    vocabulary: Vocabulary,
    decide: Decide | None,
) -> IntArray | None:
    """Return the keys of all pairs of different answers that agree; None when only equal answers do.

    Every distinct unordered pair is put to `decide` once.
    """
    if decide is None:
        return None
    wanted = [metrics.pairs_to_compare(codes_IW) for codes_IW in matrices] + [one.keys for one in expected]
    keys = np.unique(np.concatenate(wanted)) if wanted else np.empty(0, np.int64)
    verdicts = decide(vocabulary.texts(keys)) if keys.size else []
    agreeing: IntArray = keys[np.array(verdicts, bool)]
    return agreeing


def consistency_columns(
    scored: Scored, eligible_I: BoolArray, expected: metrics.ExpectedAgreement, agreeing: IntArray | None
) -> dict[str, FloatArray]:
    """Return each consistency metric's values over the inputs that enter CR."""
    codes_IW = scored.codes[eligible_I]
    present_IW = codes_IW != ABSENT
    agree_IWW = metrics.agreement_matrix(codes_IW, agreeing)
    cr_I = metrics.consistency_rate(agree_IWW, present_IW)
    e = expected.value(agreeing)
    return {
        "cr": cr_I,
        "mcr": metrics.largest_cluster_share(agree_IWW, present_IW),
        "corrected_cr": metrics.corrected_rate(cr_I, e),
        "expected_cr": np.full(len(cr_I), e),
        **metrics.outcome_shares(cr_I, scored.correct[eligible_I], present_IW),
    }


def answer_sample(grid: Grid, models: Sequence[Scored]) -> TaskSample:
    """Return the task's ANSWERS columns, model by model, as a statistic of input weights."""
    linear_IM = np.stack(
        [
            metrics.mean_over_wordings(values_IW, grid.present)
            for scored in models
            for values_IW in (scored.correct, scored.rouge_l, scored.rouge_1)
        ],
        axis=1,
    )

    def statistic(weights_BI: FloatArray) -> FloatArray:
        linear_BM = weights_BI @ linear_IM
        columns = []
        for index, scored in enumerate(models):
            accuracy_BW = metrics.wording_accuracy(scored.correct, grid.present, weights_BI)
            worst_B, spread_B = metrics.worst_and_spread(accuracy_BW)
            columns += [linear_BM[:, 3 * index : 3 * index + 3], worst_B[:, None], spread_B[:, None]]
        return np.concatenate(columns, axis=1)

    return TaskSample(len(grid.examples), statistic)


def consistency_sample(columns: Sequence[dict[str, FloatArray]]) -> TaskSample:
    """Return the task's CONSISTENCY columns, model by model, as a statistic of the weights of its eligible inputs."""
    values_IM = np.stack([column[name] for column in columns for name in CONSISTENCY], axis=1)
    return TaskSample(len(values_IM), lambda weights_BI: weights_BI @ values_IM)


def constant_accuracy(grid: Grid) -> float:
    """Return the accuracy of a task's best constant answer: its most frequent gold answer, known from hindsight."""
    answered_I = [bool(present_W.any()) for present_W in grid.present]
    examples = [example for example, answered in zip(grid.examples, answered_I, strict=True) if answered]
    form = grid.task.answer_form
    counts = Counter(
        text for example in examples for text in {normalise_answer(gold, form) for gold in example.outputs}
    )
    return max(counts.values()) / len(examples)


def against_constant_answers(grids: Sequence[Grid], accuracy: Mapping[str, Sequence[float]]) -> ConstantAnswer:
    """Return the macro mean of `constant_accuracy`, and by model the paired difference to it over tasks.

    `accuracy` holds every model's task means. Intervals are t intervals over tasks.
    """
    constant_T = np.array([constant_accuracy(grid) for grid in grids])
    differences = {name: estimate(np.array(values_T) - constant_T) for name, values_T in accuracy.items()}
    return ConstantAnswer(accuracy=estimate(constant_T, limits=SHARE), differences=differences)
