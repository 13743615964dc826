"""How many tasks and inputs a run has and how long they are: counted where prepare is complete, else assumed.

Each assumption is put in words. Knows no formula of memory or work.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from coalign.config import DataTable
from coalign.files import open_file
from coalign.records import Split, read_rows
from coalign.runs.outputs import step_output
from coalign.runs.step_folder import read_manifest

CHARACTERS_PER_TOKEN = 4  # an assumption: English in a vocabulary of 32,000 or more
TEMPLATE_TOKENS = 12  # an assumption: what a chat template puts around a message
ROW_BYTES = 400  # an assumption: a line of JSON beside its text
READ_EXAMPLES = 2000  # lengths are taken from at most this many of prepare's examples
SPLITS: tuple[str, ...] = get_args(Split)


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """The number of tasks, of inputs per split, and lengths in tokens; `assumptions` says what was not counted.

    Prompts, answers and instructions are means; `longest_tokens` is the longest prompt with its answer.
    """

    tasks: int
    inputs: dict[str, int]
    instruction_tokens: int
    prompt_tokens: int
    answer_tokens: int
    longest_tokens: int
    assumptions: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Assumed:
    """What is assumed where nothing was counted; `inputs` is the number per task and split, lengths are in tokens."""

    tasks: int = 100
    inputs: int = 100
    prompt_tokens: int = 400
    answer_tokens: int = 20


def make_counts(prepared: Path, data: DataTable, assumed: Assumed, context: int) -> Counts:
    """Return the counts of a complete prepare step, or what the limits of [data] allow.

    Lengths are cut at `context`, the tokens that the model can read.
    """
    manifest = read_manifest(prepared)
    if manifest is not None:
        counts = manifest["counts"]
        tasks = counts["tasks"]["seen"] + counts["tasks"]["unseen"]
        instruction, prompt, answer, longest = _lengths(prepared)
        inputs = {split: int(counts["inputs"][split]) for split in SPLITS}
        notes = [f"lengths: those of {READ_EXAMPLES} examples at most, {CHARACTERS_PER_TOKEN} characters per token"]
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
            notes.append(f"{assumed.inputs} inputs per task in splits without a limit (--inputs)")
        notes.append(f"prompts of {prompt} tokens, answers of {answer} (--prompt-tokens, --answer-tokens)")
    longest = min(longest, context)
    answer = min(answer, max(1, longest - 1))
    return Counts(tasks, inputs, instruction, min(prompt, longest - answer), answer, longest, tuple(notes))


def _lengths(prepared: Path) -> tuple[int, int, int, int]:
    """Return the tokens of an instruction, a prompt and an answer (means, rounded up) and of the longest row."""
    tasks = {row["id"]: len(row["instruction"]) for _, row in read_rows(step_output(prepared, "tasks.jsonl"))}
    rows = _spread_rows(step_output(prepared, "examples.jsonl"), READ_EXAMPLES)
    prompts = [_tokens(tasks[row["task"]] + len(row["input"])) + TEMPLATE_TOKENS for row in rows]
    answers = [_tokens(len(row["outputs"][0])) + 1 for row in rows]
    longest = max(p + a for p, a in zip(prompts, answers, strict=True))
    return _mean(map(_tokens, tasks.values())), _mean(prompts), _mean(answers), longest


def _spread_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """Return all rows of a short file, or at most `count` rows spread over a long one."""
    size = path.stat().st_size
    if size < count * ROW_BYTES:
        return [row for _, row in read_rows(path)]
    found: dict[int, dict[str, Any]] = {}
    with open_file(path) as stream:
        for number in range(count):
            stream.seek(number * size // count)
            if number:
                stream.readline()  # the rest of a row that began before
            place = stream.tell()
            if place not in found and (line := stream.readline().strip()):
                found[place] = json.loads(line)
    return list(found.values())


def _tokens(num_characters: int) -> int:
    return -(-num_characters // CHARACTERS_PER_TOKEN)


def _mean(values: Iterable[int]) -> int:
    found = list(values)
    return -(-sum(found) // max(1, len(found)))
