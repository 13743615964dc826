"""Accuracy and CR of coalign for lm-evaluation-harness; make_task.py puts this file beside the tasks it writes.

There it needs nothing of coalign: make_task.py writes the source of coalign.answer_form in place of its import.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalign.answer_form import normalise_answer, read_answer_map

CUT_OFF_MARK = "\ufffd"  # the text of the token that follows a cut-off answer


def canonical_answer(text: str, answers: Sequence[Sequence[str]] | None) -> str | None:
    """Return an answer in the words of the gold answers; `answers`: the wording's (label, word) pairs or None.

    None for a label that is no word of the map: the wording didn't ask for it.
    """
    known = None if answers is None else read_answer_map(tuple((label, word) for label, word in answers))
    return text.strip() if known is None else known.canonical(text.strip())


def answer_key(text: str, answers: Sequence[Sequence[str]] | None, form: Sequence[str] = ()) -> str | None:
    """Return the form by which answers are compared; None (agrees with nothing, is wrong) when empty or cut off."""
    if text.endswith(CUT_OFF_MARK):
        return None
    canonical = canonical_answer(text, answers)
    return None if canonical is None else normalise_answer(canonical, tuple(form)) or None


# What the task files name


def documents(task: str, **_: Any) -> dict[str, Any]:
    """Return a task's documents as the split "test"."""
    from datasets import Dataset  # noqa: TID251  # this runs where lm-eval is installed

    lines = Path(__file__).with_name("documents.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    return {"test": Dataset.from_list([row for row in rows if row["task"] == task])}


def prompt(document: dict[str, Any]) -> str:
    """Return the user's message."""
    return str(document["prompt"])


def target(document: dict[str, Any]) -> str:
    """Return a gold answer in the words of the wording, for the log of samples; it decides nothing."""
    return str(document["targets"][0])


def process_results(document: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Return what `accuracy` and `cr` need of one answer; a task with too few wordings has no `cr`."""
    form = tuple(document["answer_form"])
    key = answer_key(results[0], document["answers"], form)
    correct = key is not None and key in [normalise_answer(gold, form) for gold in document["golds"]]
    values: dict[str, Any] = {"accuracy": (document["example"], correct)}
    if document["min_wordings"]:
        values["cr"] = (document["example"], document["min_wordings"], key)
    return values


def accuracy(items: Sequence[tuple[str, bool]]) -> float:
    """Return the mean over inputs of the share of wordings that were answered correctly."""
    of_input: dict[str, list[bool]] = defaultdict(list)
    for example, correct in items:
        of_input[example].append(correct)
    return sum(sum(found) / len(found) for found in of_input.values()) / len(of_input)


def cr(items: Sequence[tuple[str, int, str | None]]) -> float:
    """Return the mean over inputs of agreeing pairs of wordings / all pairs; NaN when none has enough wordings."""
    of_input: dict[str, list[str | None]] = defaultdict(list)
    min_wordings = 2
    for example, least, key in items:
        of_input[example].append(key)
        min_wordings = least
    rates = []
    for keys in of_input.values():
        if len(keys) >= min_wordings:
            agreeing = sum(n * (n - 1) for key, n in Counter(keys).items() if key is not None)
            rates.append(agreeing / (len(keys) * (len(keys) - 1)))
    return sum(rates) / len(rates) if rates else float("nan")
