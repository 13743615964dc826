"""Answers whose quality is known, and what they tell of the judge: thresholds, error rates, whether it is one at all.

Used by launch/judge.py. Pure numbers: it reads log-odds and knows neither prompts nor models.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from coalign.config import JudgeTable
from coalign.records import Example, ExampleKey, Response, Task, Verdict
from coalign.text import normalise_answer, unit_hash

logger = logging.getLogger("coalign")

MIN_ROWS_TO_FIT = 8
_CALLED = {"type": "the type question", "correct": "the correctness question"}

ScoreOf = Callable[[str], float | None]  # prompt -> log P(yes) - log P(no), None for a prompt that is too long
ScoresByTruth = dict[
    tuple[str, str], tuple[list[float], list[float]]
]  # (question, part) -> scores whose truth is yes, no


@dataclasses.dataclass(frozen=True, slots=True)
class KnownAnswer:
    """An answer whose quality is known: `fit` decides thresholds, `check` and `audit` measure the judge."""

    task: str
    example: str
    text: str
    kind: Literal["right", "wrong", "wrong_type"]
    part: Literal["fit", "check", "audit"]

    def truth(self, question: str) -> bool | None:
        """Return the true answer to a question; None where it tells nothing about the judge."""
        if question == "type":
            return self.kind != "wrong_type"
        return None if self.kind == "wrong_type" else self.kind == "right"


# Which answers


def known_answers(
    tasks: Mapping[str, Task],
    examples: Mapping[ExampleKey, Example],
    responses: Iterable[Response],
    decided: Iterable[Verdict],
    table: JudgeTable,
    seed: int,
) -> list[KnownAnswer]:
    """Return the answers of known quality that the judge is measured on: of dev inputs, and with gold an audit.

    The audit takes a share of the exact matches among `decided`, and wrong answers to a share of the sampled inputs.
    """
    dev = [example for example in examples.values() if example.split == "dev"]
    known = calibration_answers(tasks, dev, table.max_dev_inputs, seed)
    if table.gold:
        sampled = [examples[key] for key in dict.fromkeys((r.task, r.example) for r in responses)]
        known += audit_answers(tasks, sampled, decided, table.audit_share, seed)
    return known


def calibration_answers(
    tasks: Mapping[str, Task], dev_examples: Sequence[Example], max_inputs: int, seed: int
) -> list[KnownAnswer]:
    """Return right, wrong and wrong-type answers to dev inputs; one half of the inputs fits, the other checks."""
    usable = [example for example in dev_examples if tasks[example.task].seen]
    chosen = sorted(usable, key=lambda e: unit_hash(str(seed), "judge dev", e.task, e.id))[:max_inputs]
    golds = _golds_by_task(usable)
    everything = [(example.task, gold) for example in usable for gold in example.outputs]
    known = []
    for index, example in enumerate(chosen):
        part: Literal["fit", "check"] = "check" if index % 2 else "fit"
        task = tasks[example.task]
        known.append(KnownAnswer(task.id, example.id, _right_answer(example), "right", part))
        wrong = wrong_answer(task, example, golds[task.id], seed)
        if wrong is not None:
            known.append(KnownAnswer(task.id, example.id, wrong, "wrong", part))
        other = wrong_type_answer(tasks, example, everything, seed)
        if other is not None:
            known.append(KnownAnswer(task.id, example.id, other, "wrong_type", part))
    return known


def audit_answers(
    tasks: Mapping[str, Task], examples: Sequence[Example], verdicts: Iterable[Verdict], share: float, seed: int
) -> list[KnownAnswer]:
    """Return a seeded share of the exact matches, and known-wrong answers to a share of the align inputs."""
    known = [
        KnownAnswer(v.task, v.example, v.text, "right", "audit")
        for v in verdicts
        if v.rule == "exact_match" and unit_hash(str(seed), "audit right", v.task, v.example, v.text) < share
    ]
    golds = _golds_by_task(examples)
    for example in examples:
        if unit_hash(str(seed), "audit wrong", example.task, example.id) < share:
            wrong = wrong_answer(tasks[example.task], example, golds[example.task], seed)
            if wrong is not None:
                known.append(KnownAnswer(example.task, example.id, wrong, "wrong", "audit"))
    return known


def wrong_answer(task: Task, example: Example, task_golds: Sequence[str], seed: int) -> str | None:
    """Return an answer of the right type that is none of the golds: another label, or another input's gold."""
    right = {normalise_answer(gold) for gold in example.outputs}
    donors = task.labels or task_golds
    return _pick(donors, lambda text: normalise_answer(text) not in right, str(seed), "wrong", example.task, example.id)


def wrong_type_answer(
    tasks: Mapping[str, Task], example: Example, golds: Sequence[tuple[str, str]], seed: int
) -> str | None:
    """Return a gold of another task that this task could not have as an answer.

    To a task with labels that is anything but a label. To free generation it is a label of another task: another free
    text may well be of the right type, so it serves only where no task has labels.
    """
    task = tasks[example.task]
    banned = {normalise_answer(text) for text in (*task.labels, *example.outputs)}
    any_labels = any(other.labels for other in tasks.values())

    def fits(donor: tuple[str, str]) -> bool:
        comparable = bool(task.labels) or not any_labels or bool(tasks[donor[0]].labels)
        return donor[0] != task.id and comparable and normalise_answer(donor[1]) not in banned

    picked = _pick(golds, fits, str(seed), "wrong type", example.task, example.id)
    return None if picked is None else picked[1]


def _pick(donors: Sequence[Any], fits: Callable[[Any], bool], *key: str) -> Any | None:
    """Return the first donor that fits from a place given by the hash of `key`, going round."""
    start = int(unit_hash(*key) * len(donors))
    order = itertools.chain(range(start, len(donors)), range(start))
    return next((donors[index] for index in order if fits(donors[index])), None)


def _right_answer(example: Example) -> str:
    """Return a gold answer, one that differs from the first where there is one: the first stands in the prompt."""
    first = normalise_answer(example.outputs[0])
    return next((gold for gold in example.outputs if normalise_answer(gold) != first), example.outputs[0])


def _golds_by_task(examples: Iterable[Example]) -> dict[str, list[str]]:
    golds: dict[str, list[str]] = defaultdict(list)
    for example in examples:
        golds[example.task].extend(example.outputs)
    return golds


# Thresholds and quality


def balanced_accuracy(yes: Sequence[float], no: Sequence[float], threshold: float = 0.0) -> float:
    """Return the mean of the shares judged rightly in either class; a score at the threshold counts as yes."""
    right_yes = sum(score >= threshold for score in yes) / len(yes)
    right_no = sum(score < threshold for score in no) / len(no)
    return (right_yes + right_no) / 2


def auc(yes: Sequence[float], no: Sequence[float]) -> float:
    """Return P(a yes scores above a no) with ties as 1/2 (Mann-Whitney)."""
    ordered = sorted(no)
    wins = sum((bisect_left(ordered, score) + bisect_right(ordered, score)) / 2 for score in yes)
    return wins / (len(yes) * len(no))


def fit_threshold(yes: Sequence[float], no: Sequence[float]) -> float:
    """Return the midpoint between neighbouring scores with the best balanced accuracy, ties toward 0.

    0 when all scores are equal, or a class has fewer than MIN_ROWS_TO_FIT rows.
    """
    if min(len(yes), len(no)) < MIN_ROWS_TO_FIT:
        return 0.0
    yes, no = sorted(yes), sorted(no)

    def merit(threshold: float) -> tuple[float, float, float]:
        accuracy = (1 - bisect_left(yes, threshold) / len(yes) + bisect_left(no, threshold) / len(no)) / 2
        return round(accuracy, 12), -abs(threshold), threshold

    midpoints = [(low + high) / 2 for low, high in itertools.pairwise(sorted({*yes, *no}))]
    return max(midpoints, key=merit, default=0.0)


def measure(yes: Sequence[float], no: Sequence[float], threshold: float) -> dict[str, Any]:
    """Return how well a question tells yes from no; the numbers are None where a class is empty.

    `false_correct` is the share of wrong answers judged yes, `false_incorrect` that of right ones judged no.
    """
    both = bool(yes) and bool(no)
    return {
        "num_yes": len(yes),
        "num_no": len(no),
        "balanced_accuracy": balanced_accuracy(yes, no, threshold) if both else None,
        "auc": auc(yes, no) if both else None,
        "false_correct": sum(s >= threshold for s in no) / len(no) if no else None,
        "false_incorrect": sum(s < threshold for s in yes) / len(yes) if yes else None,
    }


def lowest_score(prompts: Iterable[str], scores: ScoreOf) -> float | None:
    """Return the score of a question that is asked of each item of an answer: one wrong item makes it wrong.

    None when one of the prompts is too long.
    """
    found = [scores(prompt) for prompt in prompts]
    known = [score for score in found if score is not None]
    return min(known) if len(known) == len(found) else None


def collect_samples(known: Iterable[tuple[KnownAnswer, Mapping[str, Sequence[str]]]], scores: ScoreOf) -> ScoresByTruth:
    """Sort the scores of known answers by question, part and truth; prompts that are too long are passed over.

    A question that the model is not asked, since the number of items decides it, tells nothing about the model.
    """
    samples: ScoresByTruth = defaultdict(lambda: ([], []))
    for answer, asked in known:
        for question, prompts in asked.items():
            truth, score = answer.truth(question), lowest_score(prompts, scores)
            if truth is not None and score is not None:
                samples[question, answer.part][0 if truth else 1].append(score)
    return samples


def calibrate(samples: ScoresByTruth, with_type: bool) -> dict[str, Any]:
    """Return {question: threshold, how many rows fitted it, quality on rows it has not seen} for the manifest."""
    result: dict[str, Any] = {}
    for question in ("type", "correct") if with_type else ("correct",):
        fit_yes, fit_no = samples[question, "fit"]
        threshold = fit_threshold(fit_yes, fit_no)
        check, audit = samples[question, "check"], samples[question, "audit"]
        result[question] = {
            "threshold": threshold,
            "fitted": min(len(fit_yes), len(fit_no)) >= MIN_ROWS_TO_FIT,
            "fit_rows": {"yes": len(fit_yes), "no": len(fit_no)},
            "quality": measure(check[0] + audit[0], check[1] + audit[1], threshold),
            "quality_dev": measure(*check, threshold),
            "quality_audit": measure(*audit, threshold),
        }
    return result


def weakness(calibration: Mapping[str, Any], min_quality: float) -> str | None:
    """Return the sentence that stops the step, None when every question that is asked is answered well enough.

    With one task alone nothing is known to be of a wrong type: the type question then stands unmeasured.
    """
    measured = {q: v["quality"] for q, v in calibration.items() if q != "type" or v["quality"]["num_no"]}
    found = {question: _weakness(quality, min_quality) for question, quality in measured.items()}
    weak = {question: why for question, why in found.items() if why}
    if not weak:
        return None
    other = ", leave that question out (judge.type_question=false)" if "type" in weak else ""
    return (
        "; ".join(f"{_CALLED[question]}: {why}" for question, why in weak.items())
        + "; take another judge.model (the folder of a stronger model), train the judge's skill with sft.replay"
        + f"{other}, or set judge.allow_weak=true to go on with this judge; what has been scored is kept"
    )


def _weakness(quality: Mapping[str, Any], min_quality: float) -> str | None:
    """Return what is wrong with the answers to one question."""
    accuracy, area = quality["balanced_accuracy"], quality["auc"]
    known = f"{quality['num_yes']} yes and {quality['num_no']} no"
    if accuracy is None or area is None:
        return (
            f"the judge can't be measured, {known} are known, both are needed (from dev inputs and judge.audit_share;"
            " a wrong type comes from another task); raise data.dev_share"
        )
    if min(accuracy, area) >= min_quality:
        return None
    return (
        f"the judge is too weak, on {known} its balanced accuracy is {accuracy:.3f} and its AUC {area:.3f},"
        f" judge.min_quality={min_quality:g} is asked of both"
    )


def measure_judge(
    asked: Iterable[tuple[KnownAnswer, Mapping[str, Sequence[str]]]], scores: ScoreOf, table: JudgeTable
) -> tuple[dict[str, Any], str | None]:
    """Calibrate the judge on known answers that have been scored, and log how well it answers each question.

    Returns the calibration (see `calibrate`) and what is wrong with the judge, None when it is good enough.
    """
    quality = calibrate(collect_samples(asked, scores), table.type_question)
    for line in describe_calibration(quality):
        logger.info("%s", line)
    weak = weakness(quality, table.min_quality)
    if weak and table.allow_weak:
        logger.warning("going on with judge.allow_weak: %s", weak)
    return quality, weak


# What is printed


def describe_calibration(calibration: Mapping[str, Any]) -> list[str]:
    """Return printable lines: each question's threshold and how well the judge answers it."""
    lines = []
    for question, values in calibration.items():
        rows = values["fit_rows"]
        how = "fitted on" if values["fitted"] else f"not fitted (under {MIN_ROWS_TO_FIT} dev rows of a class), 0 with"
        lines.append(
            f"{question} question: threshold {values['threshold']:+.3f} ({how} {rows['yes']} yes, {rows['no']} no)"
        )
        for name, key in (("dev", "quality_dev"), ("align audit", "quality_audit"), ("together", "quality")):
            quality = values[key]
            if quality["num_yes"] or quality["num_no"]:
                lines.append(f"  {name}: {_describe_quality(quality)}")
    return lines


def _describe_quality(quality: Mapping[str, Any]) -> str:
    def shown(key: str) -> str:
        return "-" if quality[key] is None else f"{quality[key]:.3f}"

    return (
        f"balanced accuracy {shown('balanced_accuracy')}, AUC {shown('auc')}, false yes {shown('false_correct')},"
        f" false no {shown('false_incorrect')} on {quality['num_yes']} yes, {quality['num_no']} no"
    )
