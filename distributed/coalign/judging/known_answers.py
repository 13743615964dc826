"""Answers whose quality is known, on which the judge is measured: made from dev inputs, and an audit of sampled ones.

Pure texts. Knows no scores, no prompts and no model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from coalign.config import JudgeTable
from coalign.records import Example, ExampleKey, Response, Task, Verdict
from coalign.text import normalise_answer, unit_hash


@dataclasses.dataclass(frozen=True, slots=True)
class KnownAnswer:
    """An answer whose quality is known: `fit` decides thresholds, `check` and `audit` measure the judge."""

    task: str
    example: str
    text: str
    kind: Literal["right", "wrong", "wrong_type"]
    part: Literal["fit", "check", "audit"]

    def truth(self, question: str) -> bool | None:
        """Return the true answer to the question "type" or "correct"; None where it says nothing about the judge."""
        if question == "type":
            return self.kind != "wrong_type"
        return None if self.kind == "wrong_type" else self.kind == "right"


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
    """Return right, wrong and wrong-type answers to at most `max_inputs` dev inputs: half of them fit, half check."""
    usable = [example for example in dev_examples if tasks[example.task].seen]
    chosen = sorted(usable, key=lambda e: unit_hash(str(seed), "judge dev", e.task, e.id))[:max_inputs]
    golds = _golds_by_task(usable)
    everything = [(example.task, gold) for example in usable for gold in example.outputs]
    known = []
    for index, example in enumerate(chosen):
        part: Literal["fit", "check"] = "check" if index % 2 else "fit"
        task = tasks[example.task]
        known.append(KnownAnswer(task.id, example.id, _right_answer(task, example), "right", part))
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
    """Return an answer of the right type that is none of the golds: another label, or another input's gold.

    None when there is no other.
    """
    form = task.answer_form
    right = {normalise_answer(gold, form) for gold in example.outputs}
    donors = task.labels or task_golds
    return _pick(
        donors, lambda text: normalise_answer(text, form) not in right, str(seed), "wrong", example.task, example.id
    )


def wrong_type_answer(
    tasks: Mapping[str, Task], example: Example, golds: Sequence[tuple[str, str]], seed: int
) -> str | None:
    """Return a gold of another task that this task could not have as an answer.

    For a task with labels that is anything but a label. For free generation it is a label of another task. Another free
    text may well be of the right type, so it serves only where no task has labels. None when no other task has one.
    """
    task = tasks[example.task]
    banned = {normalise_answer(text, task.answer_form) for text in (*task.labels, *example.outputs)}
    any_labels = any(other.labels for other in tasks.values())

    def fits(donor: tuple[str, str]) -> bool:
        comparable = bool(task.labels) or not any_labels or bool(tasks[donor[0]].labels)
        return donor[0] != task.id and comparable and normalise_answer(donor[1], task.answer_form) not in banned

    picked = _pick(golds, fits, str(seed), "wrong type", example.task, example.id)
    return None if picked is None else picked[1]


def _pick(donors: Sequence[Any], fits: Callable[[Any], bool], *key: str) -> Any | None:
    """Return the first donor that fits, starting at a place given by the hash of `key` and wrapping round."""
    start = int(unit_hash(*key) * len(donors))
    order = itertools.chain(range(start, len(donors)), range(start))
    return next((donors[index] for index in order if fits(donors[index])), None)


def _right_answer(task: Task, example: Example) -> str:
    """Return a gold answer, preferably not the first, which is in the prompt."""
    form = task.answer_form
    first = normalise_answer(example.outputs[0], form)
    return next((gold for gold in example.outputs if normalise_answer(gold, form) != first), example.outputs[0])


def _golds_by_task(examples: Iterable[Example]) -> dict[str, list[str]]:
    golds: dict[str, list[str]] = defaultdict(list)
    for example in examples:
        golds[example.task].extend(example.outputs)
    return golds
