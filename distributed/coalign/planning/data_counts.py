"""How many tasks and inputs a run has and how long they are: counted where prepare is complete, else assumed.

Used by machine, workload and planning. Every assumption is said in words.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coalign.config import DataTable
from coalign.records import read_rows
from coalign.runs.step_folder import read_manifest

CHARACTERS_A_TOKEN = 4  # an assumption: English in a vocabulary of 32,000 or more
TEMPLATE_TOKENS = 12  # an assumption: what a chat template puts around a message
ROW_BYTES = 400  # an assumption: a line of JSON beside its text
READ_EXAMPLES = 2000  # of prepare's examples that lengths are taken from
SPLITS = ("sft", "align", "dev", "test")


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """How many tasks and inputs there are and how long they are; `assumptions` says what of it was not counted."""

    tasks: int
    inputs: dict[str, int]
    instruction_tokens: int
    prompt_tokens: int
    answer_tokens: int
    longest_tokens: int
    assumptions: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Assumed:
    """What is taken where nothing was counted; inputs are those of a task in each split."""

    tasks: int = 100
    inputs: int = 100
    prompt_tokens: int = 400
    answer_tokens: int = 20


def make_counts(prepared: Path, data: DataTable, assumed: Assumed, context: int) -> Counts:
    """Return the counts of a complete prepare step, or what the limits of [data] allow; lengths within `context`."""
    manifest = read_manifest(prepared)
    if manifest is not None:
        counts = manifest["counts"]
        tasks = counts["tasks"]["seen"] + counts["tasks"]["unseen"]
        instruction, prompt, answer, longest = _lengths(prepared)
        inputs = {split: int(counts["inputs"][split]) for split in SPLITS}
        notes = [f"lengths: prepare's examples, or {READ_EXAMPLES} of many, {CHARACTERS_A_TOKEN} characters a token"]
    else:
        tasks = min((number for number in (len(data.only_tasks), data.max_tasks) if number), default=assumed.tasks)
        limits = {split: int(getattr(data, f"max_{split}_inputs")) for split in SPLITS}
        inputs = {split: tasks * (limit or assumed.inputs) for split, limit in limits.items()}
        prompt, answer = assumed.prompt_tokens, assumed.answer_tokens
        instruction, longest = prompt // 2, prompt + answer
        notes = ["prepare is not complete: every task has as many inputs as data.max_*_inputs allow"]
        if not (data.only_tasks or data.max_tasks):
            notes.append(f"{tasks} tasks (--tasks)")
        if not all(limits.values()):
            notes.append(f"{assumed.inputs} inputs a task in splits without a limit (--inputs)")
        notes.append(f"prompts of {prompt} tokens, answers of {answer} (--prompt-tokens, --answer-tokens)")
    longest = min(longest, context)
    answer = min(answer, max(1, longest - 1))
    return Counts(tasks, inputs, instruction, min(prompt, longest - answer), answer, longest, tuple(notes))


def _lengths(prepared: Path) -> tuple[int, int, int, int]:
    """Return tokens of an instruction, a prompt and an answer, means rounded up, and of the longest row."""
    tasks = {row["id"]: len(row["instruction"]) for _, row in read_rows(prepared / "tasks.jsonl")}
    rows = _spread_rows(prepared / "examples.jsonl", READ_EXAMPLES)
    prompts = [_tokens(tasks[row["task"]] + len(row["input"])) + TEMPLATE_TOKENS for row in rows]
    answers = [_tokens(len(row["outputs"][0])) + 1 for row in rows]
    longest = max(p + a for p, a in zip(prompts, answers, strict=True))
    return _mean(map(_tokens, tasks.values())), _mean(prompts), _mean(answers), longest


def _spread_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """Return the rows of a short file, or at most `count` from all over a long one, each behind a place of its own."""
    size = path.stat().st_size
    if size < count * ROW_BYTES:
        return [row for _, row in read_rows(path)]
    found: dict[int, dict[str, Any]] = {}
    with path.open("rb") as stream:
        for number in range(count):
            stream.seek(number * size // count)
            if number:
                stream.readline()  # the rest of a row that began before
            place = stream.tell()
            if place not in found and (line := stream.readline().strip()):
                found[place] = json.loads(line)
    return list(found.values())


def _tokens(num_characters: int) -> int:
    return -(-num_characters // CHARACTERS_A_TOKEN)


def _mean(values: Iterable[int]) -> int:
    found = list(values)
    return -(-sum(found) // max(1, len(found)))
