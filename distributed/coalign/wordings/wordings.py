"""Wordings: rendered into prompts, answers mapped there and back, split into train / dev / test.

Pure functions of texts. Knows no files and no model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from coalign.answer_form import AnswerMap, read_answer_map
from coalign.errors import UserError
from coalign.prompts import SystemPrompt
from coalign.records import Task, Wording, WordingSplit
from coalign.text import unit_hash
from coalign.wordings.patterns import PatternError, match_fields

ORIGINAL = "original"
GENERATED = "model"
FILE_PREFIX = "file:"
MIN_WORDINGS = {"test": 4, "dev": 2}  # needed for a task to enter CR

PAIR_SUFFIXES = (":instruction", ":template")
FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}|[{}]")


def original_wording(task: Task) -> Wording:
    """Return the task's own instruction as its first training wording."""
    return Wording(id=ORIGINAL, task=task.id, text=task.instruction, kind=kind_for(task))


def kind_for(task: Task) -> Literal["prefix", "system"]:
    """Return the kind of a task's wordings that are no templates."""
    return "system" if task.system else "prefix"


# Rendering and answer maps


def render_prompt(wording: Wording, input_text: str) -> str | None:
    """Return the user's message: instruction and input, or the filled template.

    None when the wording is a template and its regex does not fit the input.
    """
    if wording.kind != "template":
        if not input_text:
            return wording.text
        return SystemPrompt(wording.text, input_text) if wording.kind == "system" else f"{wording.text}\n\n{input_text}"
    fields = fields_in(wording, input_text)
    return None if fields is None else _fill(wording.text, fields)


def expected_answer(wording: Wording, input_text: str, answer: str) -> str | None:
    """Return a canonical answer in the words that this wording asks for.

    The answer itself without a map. None when the map lacks it, or when it can't be told from another answer's word.
    """
    if wording.answers is None:
        return answer
    known = _answer_map(wording, input_text)
    return None if known is None else known.word(answer)


def canonical_answer(wording: Wording, input_text: str, response: str) -> str | None:
    """Return a response in canonical words, so that it compares with responses under other wordings.

    A word of the map gives its label; a label that is no word of the map gives None, since this wording did not ask
    for it; anything else stays as it is.
    """
    stripped = response.strip()
    if wording.answers is None:
        return stripped
    known = _answer_map(wording, input_text)
    return None if known is None else known.canonical(stripped)


def misfit(wording: Wording, input_text: str) -> str:
    """Return why a wording can't ask about an input ("" when it can); the gold answers are not looked at.

    "wording_does_not_fit": the regex of a template misses the input. "answer_map": on this input the map gives no words
    or the same word twice, so that no response could be mapped back.
    """
    if render_prompt(wording, input_text) is None:
        return "wording_does_not_fit"
    return "answer_map" if wording.answers is not None and _answer_map(wording, input_text) is None else ""


def fields_in(wording: Wording, input_text: str) -> dict[str, str] | None:
    """Return the named groups of the input ("" for a group that took no part), None when the regex doesn't fit.

    Raises UserError when that takes too long.
    """
    if wording.fields_regex is None:
        return {}
    try:
        return match_fields(wording.fields_regex, input_text)
    except PatternError as error:
        raise UserError(
            f"{wording.source.removeprefix(FILE_PREFIX)}: wording {wording.id!r} of task {wording.task!r}:"
            f" fields_regex={wording.fields_regex[:200]!r} {error}"
        ) from error


def _answer_map(wording: Wording, input_text: str) -> AnswerMap | None:
    """Return the wording's answer map on this input; None when there are no words or they are not distinct."""
    assert wording.answers is not None
    fields = fields_in(wording, input_text)
    if fields is None:
        return None
    # Without a regex there are no fields, and a brace in an answer is a brace.
    filled = ((label, _fill(word, fields) if wording.fields_regex else word) for label, word in wording.answers.items())
    return read_answer_map(tuple(filled))


def _fill(template: str, fields: Mapping[str, str]) -> str:
    """Replace {name} by its field and {{ }} by braces, in one pass: braces inside a field's value stay as they are."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        return fields[name] if name is not None else match[0][0]

    return FIELD.sub(value, template)


def bare_text(wording: Wording) -> str:
    """Return the wording's own words: a template without its fields."""
    if wording.kind != "template":
        return wording.text
    return " ".join(FIELD.sub(lambda match: " " if match[1] else match[0][0], wording.text).split())


# Splits


def base_id(wording: Wording) -> str:
    """Return the id that an instruction and its template share."""
    for suffix in PAIR_SUFFIXES:
        if wording.id.endswith(suffix):
            return wording.id.removesuffix(suffix)
    return wording.id


def assign_splits(
    wordings: Sequence[Wording],
    task: Task,
    num_dev: int,
    num_test: int,
    seed: int,
    fixed: Collection[str] = (),
) -> list[Wording]:
    """Return one task's wordings with their split, in the order given.

    The original is train. Ids in `fixed` keep their split, and count. The others are taken in hash order, those of
    files first, then generated ones; an instruction and its template stay together.

    Of a seen task, test takes up to `num_test`, but at most half (rounded up) of the wordings from files, and of the
    generated ones. Dev takes up to `num_dev`, but at most half (rounded down) of what remains. Train gets the rest. Of
    an unseen task all wordings from files are test, and generated ones fill up to `num_test`. Its further generated
    ones are train, where nothing reads them.
    """
    splits: dict[str, WordingSplit] = {w.id: w.split for w in wordings if w.id in fixed and w.source != ORIGINAL}

    def room(split: WordingSplit, wanted: int) -> int:
        return wanted - list(splits.values()).count(split)

    def fill(split: WordingSplit, group: Sequence[Wording], limit: int) -> None:
        free = [w for w in group if w.id not in splits]
        splits.update(dict.fromkeys(_take(free, limit, task, seed), split))

    from_files = [w for w in wordings if w.source not in (ORIGINAL, GENERATED)]
    generated = [w for w in wordings if w.source == GENERATED]
    if task.seen:
        for group in (from_files, generated):
            in_test = sum(splits.get(w.id) == "test" for w in group)
            fill("test", group, min(room("test", num_test), math.ceil(len(group) / 2) - in_test))
            num_free = sum(w.id not in splits for w in group)
            fill("dev", group, min(room("dev", num_dev), num_free // 2))
            fill("train", group, len(group))
    else:
        fill("test", from_files, len(from_files))
        fill("test", generated, room("test", num_test))
    return [dataclasses.replace(w, split=splits.get(w.id, "train")) for w in wordings]


def _take(wordings: Sequence[Wording], limit: int, task: Task, seed: int) -> set[str]:
    """Return the ids of at most `limit` wordings, whole pairs, in the order of a hash."""
    bundles: dict[str, list[str]] = {}
    for wording in wordings:
        bundles.setdefault(base_id(wording), []).append(wording.id)
    taken: set[str] = set()
    for base in sorted(bundles, key=lambda base: unit_hash(str(seed), "wording", task.id, base)):
        if len(taken) + len(bundles[base]) <= limit:
            taken.update(bundles[base])
    return taken


def without_cr(by_task: Mapping[str, Sequence[Wording]]) -> list[str]:
    """Return the tasks whose test wordings are too few for CR."""
    counts = {task: sum(wording.split == "test" for wording in found) for task, found in by_task.items()}
    return [task for task, count in counts.items() if count < MIN_WORDINGS["test"]]


def num_short(
    wordings: Sequence[Wording], task: Task, num_dev: int, num_test: int, num_train: int = 0
) -> dict[str, int]:
    """Return by split how many wordings a task lacks; the original does not count, an unseen task needs test only."""
    have = Counter(wording.split for wording in wordings if wording.source != ORIGINAL)
    asked: dict[WordingSplit, int] = {"train": num_train, "dev": num_dev, "test": num_test}
    return {
        split: number - have[split]
        for split, number in asked.items()
        if have[split] < number and (task.seen or split == "test")
    }
