"""How well a judge answers: thresholds and error rates from its scores of known answers, and whether they suffice.

Pure numbers: it reads log-odds in nats and knows neither prompts nor models.
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from coalign.config import JudgeTable
from coalign.judging.known_answers import KnownAnswer
from coalign.recipe import log_lines

logger = logging.getLogger("coalign")

MIN_ROWS_TO_FIT = 8
_CALLED = {"type": "the type question", "correct": "the correctness question"}

ScoreOf = Callable[[str], float | None]  # prompt -> log P(yes) - log P(no), None for a prompt that is too long
# (question, part) -> scores whose truth is yes, and those whose truth is no
ScoresByTruth = dict[tuple[str, str], tuple[list[float], list[float]]]


# Thresholds and quality


def balanced_accuracy(yes: Sequence[float], no: Sequence[float], threshold: float = 0.0) -> float:
    """Return the mean of the shares judged correctly in either class; a score at the threshold counts as yes.

    Neither class may be empty.
    """
    right_yes = sum(score >= threshold for score in yes) / len(yes)
    right_no = sum(score < threshold for score in no) / len(no)
    return (right_yes + right_no) / 2


def auc(yes: Sequence[float], no: Sequence[float]) -> float:
    """Return P(a yes scores above a no) with ties as 1/2 (Mann-Whitney U / (num_yes num_no)); both need a score."""
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
    """Return how well a question separates yes from no; the numbers are None where a class is empty.

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
    """Sort the scores of known answers by question, part and truth; prompts that are too long are left out.

    A question that the number of items decides is not put to the model, so it says nothing about the model.
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


def weakness(calibration: Mapping[str, Any], table: JudgeTable) -> str | None:
    """Return what is wrong with the judge, None when every question that is asked is answered well enough.

    Unless judge.allow_weak is set it also says what to do, since the step then stops. With one task alone nothing is
    known to be of a wrong type, and the type question stays unmeasured.
    """
    measured = {q: v["quality"] for q, v in calibration.items() if q != "type" or v["quality"]["num_no"]}
    found = {question: _weakness(quality, table.min_quality) for question, quality in measured.items()}
    weak = {question: why for question, why in found.items() if why}
    if not weak:
        return None
    complaint = "; ".join(f"{_CALLED[question]}: {why}" for question, why in weak.items())
    if table.allow_weak:
        return complaint
    other = ", leave that question out (judge.type_question=false)" if "type" in weak else ""
    return (
        f"{complaint}; use another judge.model (the folder of a stronger model), train the judge's skill with"
        f" sft.replay{other}, or set judge.allow_weak=true to continue with this judge; finished scores are kept"
    )


def _weakness(quality: Mapping[str, Any], min_quality: float) -> str | None:
    """Return what is wrong with the answers to one question."""
    known = f"{quality['num_yes']} yes and {quality['num_no']} no"
    needed = (
        "both kinds are needed (from dev inputs and judge.audit_share; a wrong type comes from another task); raise"
        " data.dev_share"
    )
    return complaint_of_quality(quality, known, needed, "judge.min_quality", min_quality)


def complaint_of_quality(
    quality: Mapping[str, Any], known: str, needed: str, key: str, min_quality: float
) -> str | None:
    """Return what is wrong with measured answers: too weak, or not measured; None when they are good enough.

    `quality` is what `measure` returned, `known` names its samples, `needed` says what more of them would take, and
    `key` is the setting of `min_quality`.
    """
    accuracy, area = quality["balanced_accuracy"], quality["auc"]
    if accuracy is None or area is None:
        return f"the judge can't be measured: {known} are known, and {needed}"
    if min(accuracy, area) >= min_quality:
        return None
    return (
        f"the judge is too weak: on {known} its balanced accuracy is {accuracy:.3f} and its AUC {area:.3f}, and both"
        f" must reach {key}={min_quality:g}"
    )


def measure_judge(
    asked: Iterable[tuple[KnownAnswer, Mapping[str, Sequence[str]]]], scores: ScoreOf, table: JudgeTable
) -> tuple[dict[str, Any], str | None]:
    """Calibrate the judge on known answers that have been scored, and log how well it answers each question.

    Returns the calibration (see `calibrate`) and what is wrong with the judge (see `weakness`).
    """
    quality = calibrate(collect_samples(asked, scores), table.type_question)
    log_lines(describe_calibration(quality))
    weak = weakness(quality, table)
    if weak and table.allow_weak:
        logger.warning("continuing with a weak judge (judge.allow_weak=true): %s", weak)
    return quality, weak


# What is printed


def describe_calibration(calibration: Mapping[str, Any]) -> list[str]:
    """Return printable lines: each question's threshold and how well the judge answers it."""
    lines = []
    for question, values in calibration.items():
        rows = values["fit_rows"]
        how = "fitted on" if values["fitted"] else f"not fitted (under {MIN_ROWS_TO_FIT} dev rows in a class), 0 with"
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
