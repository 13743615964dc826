"""One instance of a task, as the kinds of source write it: checks and a common form.

Knows the layouts (task files of Super-NaturalInstructions, columns, chat messages), but no library of data sets. An
error begins with file and line.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from coalign.answer_form import COUNTED, normalise_answer
from coalign.errors import UserError
from coalign.files import list_folder, read_json, read_text
from coalign.records import whole_text

Layout = Literal["auto", "columns", "messages"]
COLUMNS = ("instruction", "input", "output", "outputs", "task", "id")
NEAR_MISS = 0.75  # similarity from which a key is taken for a mistyped one: inputs, inpt, Input; not index
ROLES = ("system", "user", "assistant")


class Instance(NamedTuple):
    """One row of a source. `place` is its file and line; `task` and `id` are "" when the source names none.

    `system` is True where the instruction was a system message.
    """

    place: str
    task: str
    instruction: str
    input: str
    outputs: tuple[str, ...]
    id: str = ""
    seen: bool = True
    system: bool = False


class DroppedInstance(NamedTuple):
    """One line of dropped.jsonl: why a row or task was left out, and its file and line or source."""

    reason: str
    source: str
    id: str = ""
    detail: str = ""

    def to_row(self) -> dict[str, str]:
        """Return the line as a JSON object, without an empty detail."""
        row = self._asdict()
        return row if self.detail else {key: row[key] for key in ("reason", "source", "id")}


class FreeNames:
    """Hands out unique names in constant time: a name, then name#2, name#3, ...

    It keeps 64-bit hashes in place of the names. With a million names the odds that any two share a hash are 1 to 40
    million; the later name then counts as taken.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = {hash(name) for name in taken}
        self._last: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return hash(name) in self._taken

    def take(self, name: str) -> str:
        """Return the name, with a number when it is taken, and take it."""
        free = name
        if name in self:
            number = self._last.get(name, 1) + 1
            while f"{name}#{number}" in self:
                number += 1
            self._last[name] = number
            free = f"{name}#{number}"
        self._taken.add(hash(free))
        return free


def parse_row(row: dict[str, Any], place: str, layout: Layout = "auto") -> Instance | DroppedInstance:
    """Return the instance that a row of columns or chat messages holds.

    A conversation of several turns comes back as a DroppedInstance. Raises UserError, which begins with `place`.
    """
    name, task = _name(row, "id", place), _name(row, "task", place)
    if layout == "columns" or (layout == "auto" and "messages" not in row):
        instruction = _required(row, "instruction", place)
        key = next((key for key in ("output", "outputs") if key in row), "")
        if not key:
            raise UserError(f"{place}: no 'output' or 'outputs' (keys: {_keys(row)}); every instance needs a reference")
        if wrong := _near_miss(tuple(row)):
            raise UserError(f"{place}: the key {wrong[0]!r} is unknown; did you mean {wrong[1]!r}? Rename or remove it")
        context = row.get("input")
        text = "" if context is None else _text(context, f"{place}: input")
        return Instance(place, task, instruction, text, _references(row[key], f"{place}: {key}"), name)
    if "messages" not in row:
        raise UserError(f"{place}: no 'messages' (keys: {_keys(row)}); expected a list of chat messages")
    turns = _turns(row["messages"], f"{place}: messages")
    roles = [role for role, _ in turns]
    if roles.count("user") > 1:
        return DroppedInstance("multi_turn", place, name)
    if "user" not in roles or roles[-1] != "assistant":
        raise UserError(
            f"{place}: messages have the roles {', '.join(roles) or 'of nobody'}; expected an optional system"
            " message, a user's and an assistant's, the assistant's last"
        )
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        return DroppedInstance("multi_turn", place, name)
    *asked, (_, answer) = turns
    texts = [text for _, text in asked]
    if not texts[0].strip():
        raise UserError(f"{place}: the {roles[0]} message is empty; it is the instruction, write it or remove the row")
    context = texts[1] if len(texts) == 2 else ""
    outputs = _references(answer, f"{place}: the assistant's text")
    return Instance(place, task, texts[0].strip(), context, outputs, name, system=len(texts) == 2)


def list_task_files(folder: Path) -> tuple[dict[Path, bool], list[Path], list[DroppedInstance]]:
    """Return a Super-NaturalInstructions folder's task files (True: seen), its split files, and the tasks left out.

    Train tasks are seen, test tasks unseen, tasks in neither list are left out. Without lists every task is seen.
    Raises UserError for a folder or a list that is wrong.
    """
    tasks = folder / "tasks"
    files = [path for path in list_folder(tasks, "data.path") if path.match("*.json")] if tasks.is_dir() else []
    if not files:
        raise UserError(
            f"{folder}: no task files; a Super-NaturalInstructions folder holds tasks/*.json, check the path"
        )
    splits = folder / "splits" / "default"
    lists = [(splits / "train_tasks.txt", True), (splits / "test_tasks.txt", False)]
    lists = [(path, seen) for path, seen in lists if path.exists() or path.is_symlink()]
    if not lists:
        return dict.fromkeys(files, True), [], []
    chosen: dict[Path, bool] = {}
    for path, seen in lists:
        for number, line in enumerate(read_text(path, "data.path").splitlines(), start=1):
            name = line.strip()
            file = folder / "tasks" / f"{name}.json"
            if not name:
                continue
            if not file.exists():
                raise UserError(
                    f"{path}, line {number}: task {name!r} has no file {file}; add the file or remove the line"
                )
            if chosen.get(file, seen) != seen:
                raise UserError(f"{path}, line {number}: task {name!r} is a train task as well; keep it in one list")
            chosen[file] = seen
    left_out = [DroppedInstance("task_not_in_splits", str(file), file.stem) for file in files if file not in chosen]
    return chosen, [path for path, _ in lists], left_out


def read_task_file(path: Path, seen: bool) -> Iterator[Instance | DroppedInstance]:
    """Yield the instances of one Super-NaturalInstructions task file; the task has its name. Raises UserError."""
    task = read_json(path, "data.path", distinct=True)
    if not isinstance(task, dict):
        raise UserError(f"{path}: a JSON object was expected, not {type(task).__name__}")
    for key in ("Definition", "Instances"):
        if key not in task:
            raise UserError(f"{path}: no {key!r} (keys: {_keys(task)}); a task file needs Definition and Instances")
    definitions = [task["Definition"]] if isinstance(task["Definition"], str) else task["Definition"]
    if not isinstance(definitions, list):
        raise UserError(f"{path}: Definition={_shown(definitions)}; expected a string or a list of strings")
    texts = [_text(text, f"{path}: Definition").strip() for text in definitions]
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"{path}: Definition is empty; every task needs an instruction")
    for text in texts[1:]:
        yield DroppedInstance("further_definition", str(path), path.stem, text)
    if not isinstance(task["Instances"], list) or not task["Instances"]:
        raise UserError(f"{path}: Instances={_shown(task['Instances'])}; expected a list of at least one object")
    for index, row in enumerate(task["Instances"]):
        place = f"{path}: Instances[{index}]"
        if not isinstance(row, dict):
            raise UserError(f"{place}={_shown(row)}; expected an object with input and output")
        for key in ("input", "output"):
            if key not in row:
                raise UserError(f"{place} has no {key!r} (keys: {_keys(row)}); expected input and output")
        text = _text(row["input"], f"{place}.input")
        outputs = _references(row["output"], f"{place}.output")
        yield Instance(place, path.stem, texts[0], text, outputs, _name(row, "id", place), seen)


def distinct_references(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the texts that aren't empty, without those that equal an earlier one in whatever may count in a task.

    What counts in theirs is known when all have been read; see data/answer_forms.py.
    """
    some = [text for text in texts if text]
    if len(some) < 2:
        return tuple(some)
    distinct: dict[str, str] = {}
    for text in some:
        distinct.setdefault(normalise_answer(text, COUNTED), text)
    return tuple(distinct.values())


def _turns(messages: Any, what: str) -> list[tuple[str, str]]:
    if not isinstance(messages, list):
        raise UserError(f"{what}={_shown(messages)}; expected a list of objects with role and content")
    turns = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise UserError(f"{what}[{index}] has the role {_shown(role)}; expected one of {', '.join(ROLES)}")
        turns.append((message["role"], _text(message.get("content"), f"{what}[{index}].content")))
    return turns


@functools.lru_cache(maxsize=1000)
def _near_miss(keys: tuple[str, ...]) -> tuple[str, str] | None:
    """Return a key that is nearly that of an optional column which the row lacks, and that column."""
    for column in ("input", "task"):
        for key in () if column in keys else keys:
            if key not in COLUMNS and difflib.SequenceMatcher(None, key.lower().strip(), column).ratio() > NEAR_MISS:
                return key, column
    return None


def _required(row: dict[str, Any], key: str, place: str) -> str:
    if key not in row:
        near = difflib.get_close_matches(key, map(str, row), n=1, cutoff=NEAR_MISS)
        hint = f"rename {near[0]!r}" if near else "expected instruction, input and output, or messages"
        raise UserError(f"{place}: no {key!r} (keys: {_keys(row)}); {hint}")
    text = _text(row[key], f"{place}: {key}").strip()
    if not text:
        raise UserError(f"{place}: {key} is empty; write it or remove the row")
    return text


def _name(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{place}: {key}={_shown(value)}; expected a string or a whole number")
    return _text(str(value), f"{place}: {key}").strip()


def _references(value: Any, what: str) -> tuple[str, ...]:
    """Return the references without repeats and blanks. Raises UserError when none is left."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise UserError(f"{what}={_shown(value)}; expected a string or a list of strings")
    outputs = distinct_references(_text(text, what).strip() for text in texts)
    if not outputs:
        raise UserError(f"{what} is empty; every instance needs at least one reference")
    return outputs


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what}={_shown(value)} is of type {type(value).__name__}; expected a string")
    return whole_text(value, what)


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."
