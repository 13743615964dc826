"""Self-reward: which responses need the judge, known answers that measure it, thresholds, scores to verdicts.

Used by launch/judge.py. Pure text and numbers: it makes prompts and reads log-odds; it knows no model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from coalign.config import JudgeTable
from coalign.errors import UserError
from coalign.prompts import correct_question, type_question
from coalign.records import Example, Finish, Response, Task, Verdict
from coalign.text import normalise_answer, unit_hash

MIN_ROWS_TO_FIT = 8
_CALLED = {"type": "the type question", "correct": "the correctness question"}

ExampleKey = tuple[str, str]  # (task, example)
Scores = Callable[[str], float | None]  # prompt -> log P(yes) - log P(no), None for a prompt that is too long
Item = TypeVar("Item", "Answer", "KnownAnswer")
Samples = dict[tuple[str, str], tuple[list[float], list[float]]]  # (question, part) -> scores whose truth is yes, no


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A distinct response to one input, in canonical words."""

    task: str
    example: str
    text: str
    finish: Finish


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


# What needs a verdict


def distinct_answers(responses: Iterable[Response]) -> tuple[list[Answer], list[dict[str, Any]]]:
    """Return the distinct (input, canonical text, finish) in order of appearance, and what can't be compared."""
    answers: dict[Answer, None] = {}
    dropped = []
    for r in responses:
        if r.canonical is None:
            row = {"task": r.task, "example": r.example, "wording": r.wording, "sample": r.sample, "text": r.text}
            dropped.append({"reason": "foreign_vocabulary", **row})
        else:
            answers[Answer(r.task, r.example, r.canonical, r.finish)] = None
    return list(answers), dropped


def decide_by_rules(
    answers: Iterable[Answer], examples: Mapping[ExampleKey, Example], gold: bool
) -> tuple[dict[Answer, Verdict], list[Answer]]:
    """Return the verdicts that need no model, and the answers that do; without `gold` no match with gold is a rule."""
    decided: dict[Answer, Verdict] = {}
    undecided = []
    for answer in answers:
        verdict = decide_by_rule(answer, examples[answer.task, answer.example].outputs if gold else ())
        if verdict is None:
            undecided.append(answer)
        else:
            decided[answer] = verdict
    return decided, undecided


def decide_by_rule(answer: Answer, golds: Sequence[str]) -> Verdict | None:
    """Return the verdict where no model is needed: empty, cut off, or an exact match (`golds` empty: no such rule)."""
    if not answer.text.strip():
        return _verdict(answer, 0, "empty")
    if answer.finish == "length":
        return _verdict(answer, 0, "cut_off")
    if normalise_answer(answer.text) in {normalise_answer(gold) for gold in golds}:
        return _verdict(answer, 2, "exact_match")
    return None


def decide_by_scores(answer: Answer, scores: Mapping[str, float]) -> Verdict:
    """Return the verdict from scores above thresholds: type below 0 gives 0, else correct gives 1 or 2."""
    type_score, correct_score = scores.get("type"), scores["correct"]
    if type_score is not None and type_score < 0:
        return _verdict(answer, 0, "type", type_score, correct_score)
    return _verdict(answer, 2 if correct_score >= 0 else 1, "correct", type_score, correct_score)


def _verdict(
    answer: Answer, reward: int, rule: str, type_score: float | None = None, correct_score: float | None = None
) -> Verdict:
    return Verdict(answer.example, answer.task, answer.text, answer.finish, reward, rule, type_score, correct_score)


def questions(task: Task, example: Example, text: str, table: JudgeTable) -> dict[str, str]:
    """Return {question: prompt} for one answer; the task's original wording stands in all of them."""
    gold = example.outputs[0] if table.gold else None
    asked = {"correct": correct_question(task.instruction, example.input, text, gold)}
    if table.type_question:
        asked["type"] = type_question(task.instruction, example.input, text)
    return asked


def with_questions(
    items: Iterable[Item], tasks: Mapping[str, Task], examples: Mapping[ExampleKey, Example], table: JudgeTable
) -> list[tuple[Item, dict[str, str]]]:
    """Return each answer with the prompts to ask about it."""
    return [(item, questions(tasks[item.task], examples[item.task, item.example], item.text, table)) for item in items]


def decide_by_judge(
    asked: Iterable[tuple[Answer, Mapping[str, str]]], scores: Scores, thresholds: Mapping[str, float]
) -> tuple[dict[Answer, Verdict], list[dict[str, Any]]]:
    """Return the verdicts from the judge's scores, and rows of the answers with a prompt that was too long."""
    decided: dict[Answer, Verdict] = {}
    dropped = []
    for answer, prompts in asked:
        above = {}
        for question, prompt in prompts.items():
            score = scores(prompt)
            if score is not None:
                above[question] = score - thresholds[question]
        if len(above) == len(prompts):
            decided[answer] = decide_by_scores(answer, above)
        else:
            dropped.append({"reason": "too_long", **dataclasses.asdict(answer)})
    return decided, dropped


# Answers whose quality is known


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


# Requests: each distinct prompt is scored once


def plan_requests(
    prompts: Iterable[str],
    encode: Callable[[str], list[int]],
    continuations: list[list[int]],
    max_tokens: int,
    places: dict[str, str | None],
) -> list[dict[str, Any]]:
    """Return scoring requests for prompts whose token ids have not been asked for yet.

    `places` remembers for each prompt the key of its request over several calls, None when it is longer than
    `max_tokens` with its continuation.
    """
    asked = {key for key in places.values() if key is not None}
    longest = max(len(ids) for ids in continuations)
    requests = []
    for prompt in prompts:
        if prompt in places:
            continue
        ids = encode(prompt)
        if len(ids) + longest > max_tokens:
            places[prompt] = None
            continue
        key = hashlib.blake2b(json.dumps(ids).encode(), digest_size=16).hexdigest()
        places[prompt] = key
        if key not in asked:
            asked.add(key)
            requests.append({"key": key, "prompt_ids": ids, "continuations": continuations})
    return requests


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


def collect_samples(known: Iterable[tuple[KnownAnswer, Mapping[str, str]]], scores: Scores) -> Samples:
    """Sort the scores of known answers by question, part and truth; prompts that are too long are passed over."""
    samples: Samples = defaultdict(lambda: ([], []))
    for answer, asked in known:
        for question, prompt in asked.items():
            truth, score = answer.truth(question), scores(prompt)
            if truth is not None and score is not None:
                samples[question, answer.part][0 if truth else 1].append(score)
    return samples


def calibrate(samples: Samples, with_type: bool) -> dict[str, Any]:
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


def require_short(
    asked: Iterable[tuple[Item, Mapping[str, str]]], places: Mapping[str, str | None], max_tokens: int
) -> None:
    """Raise UserError for the first answer with a prompt that does not fit (model.too_long = "error")."""
    for item, prompts in asked:
        if any(places[prompt] is None for prompt in prompts.values()):
            raise UserError(
                f"task {item.task!r}, example {item.example!r}: the judge's prompt is longer than its context of"
                f' {max_tokens} tokens; set model.too_long="drop" to leave such responses out, or use a judge with a'
                " longer context"
            )


# What is counted and printed


def count_verdicts(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """Return the number of verdicts by reward, by rule, and by reward within each task."""
    rewards: Counter[str] = Counter()
    rules: Counter[str] = Counter()
    by_task: dict[str, Counter[str]] = defaultdict(Counter)
    for verdict in verdicts:
        rewards[str(verdict.reward)] += 1
        rules[verdict.rule] += 1
        by_task[verdict.task][str(verdict.reward)] += 1
    return {
        "rewards": _all_rewards(rewards),
        "rules": dict(sorted(rules.items())),
        "rewards_by_task": {task: _all_rewards(counts) for task, counts in sorted(by_task.items())},
    }


def count_judging(
    responses: Sequence[Response],
    undecided: Sequence[Answer],
    decided: Mapping[Answer, Verdict],
    dropped: Iterable[Mapping[str, Any]],
    num_questions: int,
    num_requests: int,
) -> dict[str, Any]:
    """Return the step's counts.

    With q questions a response, asked + saved by duplicates + saved by rules = q x comparable responses; prompts that
    are too long count among the duplicates' savings. Calls on known answers are not in here.
    """
    comparable = [r for r in responses if r.canonical is not None]
    distinct = len({(r.task, r.example, r.canonical, r.finish) for r in comparable})
    return {
        "responses": len(responses),
        "distinct": distinct,
        "dropped": dict(sorted(Counter(str(row["reason"]) for row in dropped).items())),
        "calls": {
            "asked": num_requests,
            "saved_by_duplicates": (len(comparable) - distinct + len(undecided)) * num_questions - num_requests,
            "saved_by_rules": (distinct - len(undecided)) * num_questions,
        },
        **count_verdicts(decided.values()),
    }


def _all_rewards(counts: Mapping[str, int]) -> dict[str, int]:
    return {reward: counts.get(reward, 0) for reward in ("0", "1", "2")}


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


def describe_verdicts(counts: Mapping[str, Any]) -> list[str]:
    """Return printable lines: rewards, what decided, calls saved, and the rewards of each task."""
    lines = [
        f"{counts['responses']} responses, {counts['distinct']} distinct: rewards "
        + ", ".join(f"{reward}: {number}" for reward, number in counts["rewards"].items()),
        "decided by " + ", ".join(f"{rule}: {number}" for rule, number in counts["rules"].items()),
        f"{counts['calls']['asked']} calls to the judge; saved {counts['calls']['saved_by_duplicates']} by duplicates,"
        f" {counts['calls']['saved_by_rules']} by rules",
    ]
    if counts["dropped"]:
        lines.append("left out " + ", ".join(f"{reason}: {number}" for reason, number in counts["dropped"].items()))
    for task, rewards in counts["rewards_by_task"].items():
        lines.append(f"  {task}: " + ", ".join(f"{reward}: {number}" for reward, number in rewards.items()))
    return lines
