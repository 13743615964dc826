"""What steps hand to one another: plain frozen records, one JSON object per line on disk.

Knows no model, no tokenizer and no engine.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from coalign.errors import MalformedError, UserError
from coalign.files import decode, open_file, parse_json

Split = Literal["sft", "align", "dev", "test"]
WordingSplit = Literal["train", "dev", "test"]
Finish = Literal["stop", "length"]
Row = dict[str, Any]  # one JSON object: a line of a JSONL file, a request to a worker or its result
ExampleKey = tuple[str, str]  # (task, example)
ASTRAY = "astray_wording"  # a reason in rank's dropped.jsonl, about a wording; all its other reasons are about inputs
_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
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


_CONSUMED = ("prompt_ids", "seeds", "continuations")  # keys of a request that its result does not repeat


def is_result(row: Row, request: Row) -> bool:
    """Return whether a row is a worker's complete result of a request: an answer per seed, a log-prob per continuation.

    A result repeats the other keys of its request; those of older versions had others.
    """
    kept = {key: value for key, value in request.items() if key not in _CONSUMED}
    if any(key in row and row[key] != value for key, value in json.loads(json.dumps(kept)).items()):
        return False
    if "seeds" in request:
        answers = row.get("answers")
        return isinstance(answers, list) and len(answers) == len(request["seeds"]) and all(map(_is_answer, answers))
    if "continuations" in request:
        logps = row.get("logps")
        whole = isinstance(logps, list) and len(logps) == len(request["continuations"])
        return whole and all(isinstance(one, float | int) for one in row["logps"])
    return True


def _is_answer(answer: object) -> bool:
    if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
        return False
    return answer.get("finish") in get_args(Finish) and type(answer.get("num_tokens")) is int


Record = TypeVar("Record", Task, Example, Wording, Response, Verdict, Group)


def to_row(record: Any) -> dict[str, Any]:
    """Return the record as a JSON-ready dict."""
    return dataclasses.asdict(record)


def from_row(kind: type[Record], row: dict[str, Any]) -> Record:
    """Rebuild a record from a dict made by `to_row`. Raises MalformedError, which names the key that is wrong.

    A key with a default may be missing, as in files of older versions.
    """
    made: Record = _from_row(kind, row, "")
    return made


def _from_row(kind: type, row: dict[str, Any], place: str) -> Any:
    readers, required = _readers_of(kind)
    if not row.keys() <= readers.keys() or not required <= row.keys():
        unknown, missing = sorted(row.keys() - readers.keys()), sorted(required - row.keys())
        what = f"{place}{missing[0]!r} is missing" if missing else f"{place}{unknown[0]!r} is unknown"
        raise MalformedError(f"the key {what}")
    return kind(**{key: readers[key](value, f"{place}{key!r}") for key, value in row.items()})


@functools.cache
def _readers_of(kind: type) -> tuple[dict[str, Callable[[Any, str], Any]], frozenset[str]]:
    """Return {field: what checks and converts its value}, and the fields that have no default."""
    hints = get_type_hints(kind)
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(kind)
    required = frozenset(field.name for field in fields if field.default is dataclasses.MISSING)
    return {field.name: _reader_of(hints[field.name]) for field in fields}, required


def _reader_of(hint: Any) -> Callable[[Any, str], Any]:
    """Return a function (value, place) that returns the value of a field, or raises MalformedError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (_reader_of(one) for one in arguments if one is not types.NoneType)
        return lambda value, place: None if value is None else inner(value, place)
    if origin is tuple:
        each = _reader_of(arguments[0])
        return lambda value, place: tuple(each(one, place) for one in _expect(list, value, place, "a list"))
    if origin is dict:
        each = _reader_of(arguments[1])
        return lambda value, place: {
            key: each(one, place) for key, one in _expect(dict, value, place, "an object").items()
        }
    if origin is Literal:
        return lambda value, place: _one_of(arguments, value, place)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return lambda value, place: _from_row(hint, _expect(dict, value, place, "an object"), f"{place}: ")
    accepted = (int, float) if hint is float else hint
    return lambda value, place: _expect(accepted, value, place, _NAMES[hint], boolean=hint is bool)


def _expect(kind: Any, value: Any, place: str, name: str, boolean: bool = False) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and not boolean):
        raise MalformedError(f"the key {place}: {name} was expected, not {_short(value)}")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MalformedError(f"the key {place}: half a surrogate pair at character {error.start}") from error
    return value


def _one_of(allowed: tuple[Any, ...], value: Any, place: str) -> Any:
    if not isinstance(value, str) or value not in allowed:
        raise MalformedError(f"the key {place}: one of {', '.join(allowed)} was expected, not {_short(value)}")
    return value


def _short(value: Any) -> str:
    return ascii(value) if isinstance(value, str | int | float) and len(str(value)) <= 40 else type(value).__name__


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
    """Return the records in a JSONL file of one of our steps; `wanted` are values to select by (split="dev").

    Raises UserError, which names file, line and key, for a row that is no such record.
    """
    found = []
    for number, row in read_rows(path):
        if all(row.get(key, value) == value for key, value in wanted.items()):
            try:
                found.append(from_row(kind, row))
            except MalformedError as error:
                raise UserError(f"{path}, line {number}: {error}; run the step that wrote it again") from error
    return found
