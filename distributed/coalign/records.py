"""What steps hand to one another: plain frozen records, one JSON object per line on disk.

Knows no model, no tokenizer and no engine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from coalign.errors import UserError
from coalign.files import decode, open_file, parse_json

Split = Literal["sft", "align", "dev", "test"]
WordingSplit = Literal["train", "dev", "test"]
Finish = Literal["stop", "length"]
Row = dict[str, Any]  # one JSON object: a line of a JSONL file, a request to a worker or its result
ExampleKey = tuple[str, str]  # (task, example)
ASTRAY = "astray_wording"  # a reason in rank's dropped.jsonl, about a wording; all its other reasons are about inputs
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)  # json.dumps would make one per line


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One task: an instruction and what is known about its answers.

    `labels` are the distinct answers of a classification task, empty for free generation.
    `seen` is False for a task whose inputs are never trained on (evaluation on unseen tasks). `system` is True for chat
    data whose instruction was a system message. `answer_form` names what counts when its answers are compared, and else
    would not: "case", "space" (white space), "numbers" (how one is written).
    """

    id: str
    instruction: str
    labels: tuple[str, ...] = ()
    seen: bool = True
    source: str = ""
    system: bool = False
    answer_form: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One input of a task with its gold answers (at least one) and the split it fell into."""

    id: str
    task: str
    input: str
    outputs: tuple[str, ...]
    split: Split


@dataclasses.dataclass(frozen=True, slots=True)
class Wording:
    """One way to ask for a task.

    A `prefix` comes before the input. So does a `system` text, as a system message where the chat template has one. A
    `template` renders the whole prompt from the named groups of `fields_regex`
    (`re.match` on the input); `answers` maps a gold answer to the word that this template asks for.
    """

    id: str
    task: str
    text: str
    kind: Literal["prefix", "template", "system"] = "prefix"
    fields_regex: str | None = None
    answers: dict[str, str] | None = None
    source: str = "original"
    split: WordingSplit = "train"


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """What the model said to one input under one wording.

    `canonical` is `text` mapped back through the wording's answer map, so that responses under different wordings can
    be compared; None when the text belongs to another wording's vocabulary and can't be compared.
    """

    example: str
    task: str
    wording: str
    sample: int
    text: str
    canonical: str | None
    finish: Finish
    num_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The reward of one distinct response to one input: 0 wrong type, cut off or empty; 1 incorrect; 2 correct.

    `type_score` and `correct_score` are log P(yes) - log P(no) minus the fitted threshold (None: not asked).
    `rule` says what decided: "empty", "cut_off", "exact_match", "type", "item_count" (a list that is longer or shorter
    than the gold one) or "correct".
    """

    example: str
    task: str
    text: str
    finish: Finish
    reward: int
    rule: str
    type_score: float | None = None
    correct_score: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A distinct response to one input, in canonical words; in a group written as the group's wording asks for it.

    `count` is how often it was generated, `wordings` under which wordings; the gold answer that joined has neither.
    """

    text: str
    reward: int
    finish: Finish
    count: int
    wordings: tuple[str, ...]
    best: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """One wording as prompt and the responses ranked under it; exactly one candidate is `best`."""

    example: str
    task: str
    wording: str
    candidates: tuple[Candidate, ...]


class Worker(Protocol):
    """Computes one shard: rows in, as many rows out, in the same order."""

    def __call__(self, rows: list[Row]) -> list[Row]: ...


Record = TypeVar("Record", Task, Example, Wording, Response, Verdict, Group)


def to_row(record: Any) -> dict[str, Any]:
    """Return the record as a JSON-ready dict."""
    return dataclasses.asdict(record)


def from_row(kind: type[Record], row: dict[str, Any]) -> Record:
    """Rebuild a record from a dict made by `to_row`; unknown or missing keys raise TypeError."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    if kind is Group:
        values["candidates"] = tuple(Candidate(**{**c, "wordings": tuple(c["wordings"])}) for c in values["candidates"])
    return kind(**values)


def dump_line(row: dict[str, Any]) -> str:
    """Return one JSONL line: UTF-8, no NaN, newline at the end."""
    return _ENCODER.encode(row) + "\n"


def whole_text(text: str, what: str) -> str:
    """Return a text that can be written as UTF-8. Raises UserError, which begins with `what`, for another one.

    JSON can spell half a surrogate pair, such as \\ud800, which is no character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} has half a surrogate pair at character {error.start}; write the whole one") from error
    return text


def read_rows(path: Path, key: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSONL file, without blank lines.

    `key` names the setting that names the file. Raises UserError with file and line for a file that can't be opened,
    bytes that are not UTF-8, a line without a JSON object, or a key that an object has twice.
    """
    with open_file(path, key) as stream:
        for number, raw in enumerate(stream, start=1):
            place = f"{path}, line {number}"
            text = decode(raw, place, start=number == 1)
            if not text.strip():
                continue
            row = parse_json(text, place, distinct=True)
            if not isinstance(row, dict):
                raise UserError(f"{place}: a JSON object was expected, not {type(row).__name__}")
            yield number, row


def read_records(kind: type[Record], path: Path, **wanted: str) -> list[Record]:
    """Return the records in a JSONL file of one of our steps; `wanted` are values to select by (split="dev")."""
    rows = (row for _, row in read_rows(path) if all(row[key] == value for key, value in wanted.items()))
    return [from_row(kind, row) for row in rows]
