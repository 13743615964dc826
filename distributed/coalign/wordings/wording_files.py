"""Files of wordings: JSONL rows of one wording or of all wordings of a task, checked key by key.

Knows no model and no splits beyond those that a row names.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from coalign.answer_form import counted_in, normalise_answer
from coalign.errors import UserError
from coalign.records import Task, Wording, WordingSplit, read_rows, whole_text
from coalign.wordings.patterns import PatternError, compile_pattern
from coalign.wordings.wordings import FIELD, FILE_PREFIX, PAIR_SUFFIXES, fields_in, kind_for

_FLAT_KEYS = ("task", "id", "text", "kind", "fields_regex", "answers", "source", "split")
_NESTED_KEYS = ("instructions", "templates")
_OPTIONS_FIELD = "{options_}"


@dataclasses.dataclass(frozen=True, slots=True)
class WordingFiles:
    """What files of wordings hold; `dropped` are rows {task, id, text, reason} of wordings of unknown tasks.

    `with_split` are the (task, id) of wordings whose row names their split.
    """

    wordings: list[Wording]
    dropped: list[dict[str, Any]]
    with_split: frozenset[tuple[str, str]]


def load_wordings(paths: Iterable[str | Path], tasks: Mapping[str, Task]) -> tuple[list[Wording], list[dict[str, Any]]]:
    """Return the wordings of these tasks in files, and rows {task, id, text, reason} of those of other tasks.

    `tasks` are keyed by id. Raises UserError that names file, line and key.
    """
    files = read_wordings(paths, tasks)
    return files.wordings, files.dropped


def read_wordings(paths: Iterable[str | Path], tasks: Mapping[str, Task], examples: Path | None = None) -> WordingFiles:
    """Return what JSONL files of wordings hold; arguments and errors as in `load_wordings`.

    A flat row is a Wording; a nested row holds `instructions` and `templates` of one task, which share `fields_regex`
    and `options`. Patterns and answer maps are tried on the inputs in `examples`, a file that prepare writes.
    """
    wordings: list[Wording] = []
    dropped: list[dict[str, Any]] = []
    with_split: set[tuple[str, str]] = set()
    places: dict[tuple[str, str], str] = {}
    for path in map(Path, paths):
        in_file: set[str] = set()
        for number, row in read_rows(path):
            where = f"{path}, line {number}"
            nested = any(key in row for key in _NESTED_KEYS)
            for wording in _nested_row(row, path, where) if nested else [_flat_row(row, path, where)]:
                in_file.add(wording.task)
                key = (wording.task, wording.id)
                if key in places:
                    raise UserError(
                        f"{where}: the id {wording.id!r} of task {wording.task!r} was used before ({places[key]});"
                        " ids must differ within a task, rename one"
                    )
                places[key] = where
                if wording.task not in tasks:
                    lost = {"task": wording.task, "id": wording.id, "text": wording.text, "reason": "unknown_task"}
                    dropped.append(lost)
                    continue
                _check_labels(wording, tasks[wording.task], where)
                plain = wording.kind == "template"
                wordings.append(wording if plain else dataclasses.replace(wording, kind=kind_for(tasks[wording.task])))
                if not nested and row.get("split") is not None:
                    with_split.add(key)
        _check_overlap(path, in_file, tasks)
    if examples is not None:
        _try_on_examples(wordings, examples)
    return WordingFiles(wordings, dropped, frozenset(with_split))


def _try_on_examples(wordings: Iterable[Wording], examples: Path) -> None:
    """Match every `fields_regex` with the inputs of its task, and look for a gold answer that `answers` knows.

    Raises UserError for what takes too long, and for a map without any gold answer: nothing could be asked with it.
    """
    patterns: dict[str, dict[str, Wording]] = defaultdict(dict)
    maps: dict[str, list[Wording]] = defaultdict(list)
    for wording in wordings:
        if wording.fields_regex is not None:
            patterns[wording.task].setdefault(wording.fields_regex, wording)
        if wording.answers is not None:
            maps[wording.task].append(wording)
    golds: dict[str, set[str]] = defaultdict(set)
    for _, row in read_rows(examples) if patterns or maps else ():
        for wording in patterns[row["task"]].values():
            fields_in(wording, row["input"])
        if row["task"] in maps:
            golds[row["task"]].update(row["outputs"])
    for task, found in golds.items():
        for wording in maps[task]:
            assert wording.answers is not None
            if not _knows_any(wording.answers, found):
                where = f"{wording.source.removeprefix(FILE_PREFIX)}: wording {wording.id!r}"
                raise UserError(_knows_no_answer(where, wording.answers, task, found))


def _check_labels(wording: Wording, task: Task, where: str) -> None:
    """Raise UserError when a wording's answer map has none of its task's labels: nothing could be asked with it."""
    if wording.answers is not None and task.labels and not _knows_any(wording.answers, task.labels):
        raise UserError(_knows_no_answer(where, wording.answers, task.id, task.labels))


def _knows_any(answers: Mapping[str, str], golds: Iterable[str]) -> bool:
    form = counted_in(answers)
    known = {normalise_answer(label, form) for label in answers}
    return any(normalise_answer(gold, form) in known for gold in golds)


def _knows_no_answer(where: str, answers: Mapping[str, str], task: str, golds: Iterable[str]) -> str:
    return (
        f"{where}: answers has {_some(answers)}, which are no answers of task {task!r} ({_some(golds)}); write the"
        " task's own answers before the colons"
    )


def _check_overlap(path: Path, in_file: set[str], tasks: Mapping[str, Task]) -> None:
    if not in_file:
        raise UserError(f"{path}: holds no wordings; JSONL rows with task, id and text were expected")
    if in_file.isdisjoint(tasks):
        raise UserError(
            f"{path}: none of its {len(in_file)} tasks is among the {len(tasks)} of this run; the file has"
            f" {_some(in_file)}, the run has {_some(tasks)}; use the run's names in the file"
        )


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(map(repr, ordered[:3])) + (", ..." if len(ordered) > 3 else "")


def _flat_row(row: dict[str, Any], path: Path, where: str) -> Wording:
    for key in row:
        near = difflib.get_close_matches(key, _FLAT_KEYS, n=1, cutoff=0.75)
        if key not in _FLAT_KEYS and near and near[0] not in row:
            raise UserError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}?")
    kind: Any = row.get("kind") or "prefix"
    split: Any = row.get("split") or "train"
    if kind not in ("prefix", "template", "system"):
        raise UserError(f"{where}: kind={kind!r}; it must be 'prefix' or 'template'")
    if split not in get_args(WordingSplit):
        raise UserError(f"{where}: split={split!r}; it must be one of {', '.join(get_args(WordingSplit))}")
    source = _string(row, "source", where) if row.get("source") is not None else ""
    wording = Wording(
        id=_string(row, "id", where),
        task=_string(row, "task", where),
        text=_string(row, "text", where),
        kind=kind,
        fields_regex=_string(row, "fields_regex", where) if row.get("fields_regex") is not None else None,
        answers=_answers(row, where),
        source=_file_source(path, source),
        split=split,
    )
    _check_fields(wording, where)
    return wording


def _nested_row(row: dict[str, Any], path: Path, where: str) -> list[Wording]:
    """Return the instructions and templates of one task; its `split` is the task's, not the wordings'."""
    task = _string(row, "task", where)
    regex = _string(row, "fields_regex", where) if row.get("fields_regex") is not None else None
    source = _file_source(path, _string(row, "source", where) if row.get("source") is not None else "")
    parts = {key: _items(row, key, where) for key in _NESTED_KEYS}
    ids = {key: {_string(item, "id", f"{where}, {key}") for item in items} for key, items in parts.items()}
    paired = ids["instructions"] & ids["templates"]
    wordings = []
    for key, suffix in zip(_NESTED_KEYS, PAIR_SUFFIXES, strict=True):
        for index, item in enumerate(parts[key]):
            place = f"{where}, {key}[{index}]"
            text = _string(item, "text", place)
            if key == "templates":
                text = _with_options(text, row.get("options"), place)
            wording = Wording(
                id=item["id"] + (suffix if item["id"] in paired else ""),
                task=task,
                text=text,
                kind="template" if key == "templates" else "prefix",
                fields_regex=regex,
                answers=_answers(item, place),
                source=source,
            )
            _check_fields(wording, place)
            wordings.append(wording)
    return wordings


def _items(row: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    items = row.get(key) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{where}: {key} must be a list of objects with id and text, not {_shown(items)}")
    return items


def _string(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise UserError(f"{where}: the key {key!r} is missing; a wording needs task, id and text")
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key}={_shown(value)}; a text that is not empty was expected")
    return whole_text(value, f"{where}: {key}")


def _answers(row: dict[str, Any], where: str) -> dict[str, str] | None:
    value = row.get("answers")
    if value is None:
        return None
    if not isinstance(value, dict) or not value or not all(isinstance(word, str) and word for word in value.values()):
        raise UserError(f"{where}: answers={_shown(value)}; an object from gold answers to words was expected, or null")
    for text in (*value, *value.values()):
        whole_text(text, f"{where}: answers")
    for label, other in _repeated(value).items():
        raise UserError(
            f"{where}: answers gives {other!r} and {label!r} the same word {value[label]!r}, so a response"
            " could not be mapped back; give every answer a word of its own"
        )
    return value


def _repeated(answers: dict[str, str]) -> dict[str, str]:
    """Return {label: earlier label} where both get the same word; spellings of one label are one label."""
    first: dict[str, str] = {}
    repeated = {}
    of_labels, of_words = counted_in(answers), counted_in(answers.values())
    for label, word in answers.items():
        earlier = first.setdefault(normalise_answer(word, of_words), label)
        if normalise_answer(earlier, of_labels) != normalise_answer(label, of_labels):
            repeated[label] = earlier
    return repeated


def _with_options(text: str, options: Any, where: str) -> str:
    if _OPTIONS_FIELD not in text:
        return text
    if not isinstance(options, list) or not options or not all(isinstance(option, str) for option in options):
        raise UserError(
            f"{where}: the text has {_OPTIONS_FIELD}, but the row's options={_shown(options)}; a list of texts was"
            " expected"
        )
    for option in options:
        whole_text(option, f"{where}: options")
    return text.replace(_OPTIONS_FIELD, "\n".join(["OPTIONS:", *(f"- {option}" for option in options)]))


def _check_fields(wording: Wording, where: str) -> None:
    """Raise UserError for a bad regex, a template without one, or a field that it lacks."""
    if wording.fields_regex is None:
        if wording.kind == "template":
            raise UserError(f"{where}: a template needs fields_regex, whose named groups are its fields; add it")
        return
    try:
        groups = compile_pattern(wording.fields_regex).groupindex
    except PatternError as error:
        raise UserError(f"{where}: fields_regex={wording.fields_regex[:200]!r} {error}") from error
    texts = {"text": wording.text} if wording.kind == "template" else {}
    texts |= {f"answers[{label!r}]": word for label, word in (wording.answers or {}).items()}
    for key, text in texts.items():
        for match in FIELD.finditer(text):
            if match[0] in ("{", "}"):
                raise UserError(
                    f"{where}: a single {match[0]!r} in {key} ({text[:60]!r}); a field is {{name}}, and a brace itself"
                    " is written twice"
                )
            if match[1] and match[1] not in groups:
                known = ", ".join(groups) or "no named group"
                raise UserError(f"{where}: {key} names the field {match[1]!r}, but fields_regex has {known}")


def _file_source(path: Path, source: str) -> str:
    return f"{FILE_PREFIX}{path.name}:{source}" if source else f"{FILE_PREFIX}{path.name}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
