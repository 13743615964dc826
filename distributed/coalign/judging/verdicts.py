"""Which responses need the judge, what it is asked, and how its scores become verdicts.

Pure text and numbers: it makes prompts and reads log-odds in nats. Knows no model; calibration measures the judge.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from coalign.config import JudgeTable
from coalign.errors import UserError
from coalign.judging.calibration import ScoreOf, lowest_score
from coalign.judging.known_answers import KnownAnswer
from coalign.prompts import correct_question, type_question
from coalign.records import Example, ExampleKey, Finish, Response, Task, Verdict
from coalign.text import AnswerForm, normalise_answer

AnyAnswer = TypeVar("AnyAnswer", "DistinctAnswer", KnownAnswer)
PromptsByQuestion = Mapping[str, tuple[str, ...]]  # question -> its prompts: one, or one per item of a list


@dataclasses.dataclass(frozen=True, slots=True)
class DistinctAnswer:
    """A distinct response to one input, in canonical words."""

    task: str
    example: str
    text: str
    finish: Finish


# What needs a verdict


def distinct_answers(responses: Iterable[Response]) -> tuple[list[DistinctAnswer], list[dict[str, Any]]]:
    """Return the distinct (input, canonical text, finish) in order, and rows of what can't be compared."""
    answers: dict[DistinctAnswer, None] = {}
    dropped = []
    for r in responses:
        if r.canonical is None:
            row = {"task": r.task, "example": r.example, "wording": r.wording, "sample": r.sample, "text": r.text}
            dropped.append({"reason": "foreign_vocabulary", **row})
        else:
            answers[DistinctAnswer(r.task, r.example, r.canonical, r.finish)] = None
    return list(answers), dropped


def decide_by_rules(
    answers: Iterable[DistinctAnswer],
    examples: Mapping[ExampleKey, Example],
    gold: bool,
    tasks: Mapping[str, Task] | None = None,
) -> tuple[dict[DistinctAnswer, Verdict], list[DistinctAnswer]]:
    """Return the verdicts that need no model, and the answers that do; without `gold` no match with gold is a rule.

    `tasks` say what counts when their answers are compared (None: what does by default).
    """
    decided: dict[DistinctAnswer, Verdict] = {}
    undecided = []
    for answer in answers:
        form = tasks[answer.task].answer_form if tasks else ()
        verdict = decide_by_rule(answer, examples[answer.task, answer.example].outputs if gold else (), form)
        if verdict is None:
            undecided.append(answer)
        else:
            decided[answer] = verdict
    return decided, undecided


def decide_by_rule(answer: DistinctAnswer, golds: Sequence[str], form: AnswerForm = ()) -> Verdict | None:
    """Return the verdict where no model is needed: empty, cut off, or an exact match (`golds` empty: no such rule)."""
    if not answer.text.strip():
        return _verdict(answer, 0, "empty")
    if answer.finish == "length":
        return _verdict(answer, 0, "cut_off")
    if normalise_answer(answer.text, form) in {normalise_answer(gold, form) for gold in golds}:
        return _verdict(answer, 2, "exact_match")
    return None


def decide_by_scores(answer: DistinctAnswer, scores: Mapping[str, float]) -> Verdict:
    """Return the verdict from scores above thresholds: type below 0 gives 0, else correct gives 1 or 2.

    Without a score for correct the answer has another number of items than the gold answer, so it gets 1 at most.
    """
    type_score, correct_score = scores.get("type"), scores.get("correct")
    if type_score is not None and type_score < 0:
        return _verdict(answer, 0, "type", type_score, correct_score)
    if correct_score is None:
        return _verdict(answer, 1, "item_count", type_score)
    return _verdict(answer, 2 if correct_score >= 0 else 1, "correct", type_score, correct_score)


def _verdict(
    answer: DistinctAnswer, reward: int, rule: str, type_score: float | None = None, correct_score: float | None = None
) -> Verdict:
    return Verdict(answer.example, answer.task, answer.text, answer.finish, reward, rule, type_score, correct_score)


def questions(task: Task, example: Example, text: str, table: JudgeTable) -> PromptsByQuestion:
    """Return {question: prompts} for one answer; without gold all show the task's original instruction.

    With gold and `item_separator` the answer is compared with the gold one item by item. Another number of items is
    not correct, and nothing is asked about it.
    """
    gold = example.outputs[0] if table.gold else None
    asked: dict[str, tuple[str, ...]] = {}
    if gold is None or not table.item_separator:
        asked["correct"] = (correct_question(task.instruction, example.input, text, gold),)
    else:
        said, expected = (split_items(whole, table.item_separator) for whole in (text, gold))
        if len(said) == len(expected):
            pairs = zip(said, expected, strict=True)
            asked["correct"] = tuple(correct_question(task.instruction, example.input, *pair) for pair in pairs)
    if table.type_question:
        asked["type"] = (type_question(task.instruction, example.input, text),)
    return asked


def split_items(text: str, separator: str) -> list[str]:
    """Return the items of a list answer without the blanks around them; a text without any item is one itself."""
    return [item.strip() for item in text.split(separator) if item.strip()] or [text]


def with_questions(
    items: Iterable[AnyAnswer], tasks: Mapping[str, Task], examples: Mapping[ExampleKey, Example], table: JudgeTable
) -> list[tuple[AnyAnswer, PromptsByQuestion]]:
    """Return each answer with the prompts to ask about it."""
    return [(item, questions(tasks[item.task], examples[item.task, item.example], item.text, table)) for item in items]


def decide_by_judge(
    asked: Iterable[tuple[DistinctAnswer, PromptsByQuestion]], scores: ScoreOf, thresholds: Mapping[str, float]
) -> tuple[dict[DistinctAnswer, Verdict], list[dict[str, Any]]]:
    """Return the verdicts from the judge's scores, and rows of the answers with a prompt that was too long."""
    decided: dict[DistinctAnswer, Verdict] = {}
    dropped = []
    for answer, by_question in asked:
        above = {}
        for question, prompts in by_question.items():
            score = lowest_score(prompts, scores)
            if score is not None:
                above[question] = score - thresholds[question]
        if len(above) == len(by_question):
            decided[answer] = decide_by_scores(answer, above)
        else:
            dropped.append({"reason": "too_long", **dataclasses.asdict(answer)})
    return decided, dropped


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


def require_decided(
    decided: Mapping[DistinctAnswer, Verdict], responses: Sequence[Response], too_long: Sequence[dict[str, Any]]
) -> None:
    """Raise UserError when no response has a verdict."""
    if not decided:
        raise UserError(f"no response is left to judge ({len(responses)} responses, {len(too_long)} of them too long)")


def count_judging(
    responses: Sequence[Response],
    asked: Sequence[tuple[DistinctAnswer, PromptsByQuestion]],
    decided: Mapping[DistinctAnswer, Verdict],
    dropped: Iterable[Mapping[str, Any]],
    num_questions: int,
    num_requests: int,
) -> dict[str, Any]:
    """Return the step's counts.

    With q questions per response, asked + saved by duplicates + saved by rules = q x comparable responses. A question
    put to each of n items counts n times. Prompts that are too long count as saved by duplicates. Calls on known
    answers are not counted.
    """
    num_prompts = sum(sum(map(len, by_question.values())) for _, by_question in asked)
    num_open = sum(len(by_question) for _, by_question in asked)
    comparable = [r for r in responses if r.canonical is not None]
    distinct = len({(r.task, r.example, r.canonical, r.finish) for r in comparable})
    return {
        "responses": len(responses),
        "distinct": distinct,
        "dropped": dict(sorted(Counter(str(row["reason"]) for row in dropped).items())),
        "calls": {
            "asked": num_requests,
            "saved_by_duplicates": (len(comparable) - distinct) * num_questions + num_prompts - num_requests,
            "saved_by_rules": distinct * num_questions - num_open,
        },
        **count_verdicts(decided.values()),
    }


def _all_rewards(counts: Mapping[str, int]) -> dict[str, int]:
    return {reward: counts.get(reward, 0) for reward in ("0", "1", "2")}


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
