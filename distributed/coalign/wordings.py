"""Wordings: read from files, rendered into prompts, answers mapped there and back, split into train / dev / test.

Used by every step that shows an instruction to a model or compares answers over wordings. Knows no model.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from coalign.errors import UserError
from coalign.records import Task, Wording, WordingSplit, read_rows
from coalign.text import normalise_answer, unit_hash

ORIGINAL = "original"
GENERATED = "model"
FILE_PREFIX = "file:"
MIN_WORDINGS = {"test": 4, "dev": 2}  # that a task needs to enter CR

_FLAT_KEYS = ("task", "id", "text", "kind", "fields_regex", "answers", "source", "split")
_NESTED_KEYS = ("instructions", "templates")
_PAIR_SUFFIXES = (":instruction", ":template")
_TOKEN = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}|[{}]")
_OPTIONS_FIELD = "{options_}"


def original_wording(task: Task) -> Wording:
    """Return the task's own instruction as its first training wording."""
    return Wording(id=ORIGINAL, task=task.id, text=task.instruction)


# Rendering and answer maps


def render_prompt(wording: Wording, input_text: str) -> str | None:
    """Return the user's message: instruction and input, or the filled template.

    None when the wording is a template and its regex does not fit the input.
    """
    if wording.kind == "prefix":
        return f"{wording.text}\n\n{input_text}" if input_text else wording.text
    fields = _fields(wording, input_text)
    return None if fields is None else _fill(wording.text, fields)


def expected_answer(wording: Wording, input_text: str, answer: str) -> str | None:
    """Return a canonical answer in the words that this wording asks for.

    The answer itself without a map. None when the map lacks it, or when it can't be told from another answer's word.
    """
    if wording.answers is None:
        return answer
    rendered = _answer_words(wording, input_text)
    if rendered is None:
        return None
    return rendered.get(normalise_answer(answer), (None, None))[1]


def canonical_answer(wording: Wording, input_text: str, response: str) -> str | None:
    """Return a response in canonical words, so that it compares with responses under other wordings.

    A word of the map gives its label; a label that is no word of the map gives None, since this wording did not ask
    for it; anything else stays as it is.
    """
    stripped = response.strip()
    if wording.answers is None:
        return stripped
    rendered = _answer_words(wording, input_text)
    if rendered is None:
        return None
    said = normalise_answer(stripped)
    for label, word in rendered.values():
        if normalise_answer(word) == said:
            return label
    return None if said in rendered else stripped


def misfit(wording: Wording, input_text: str) -> str:
    """Return why a wording can't ask about an input ("" when it can); the gold answers are not looked at.

    "wording_does_not_fit": the regex of a template misses the input. "answer_map": on this input the map gives no words
    or the same word twice, so that no response could be mapped back.
    """
    if render_prompt(wording, input_text) is None:
        return "wording_does_not_fit"
    return "answer_map" if wording.answers is not None and _answer_words(wording, input_text) is None else ""


def _fields(wording: Wording, input_text: str) -> dict[str, str] | None:
    """Return the named groups of the input ("" for a group that took no part), None when the regex doesn't fit."""
    if wording.fields_regex is None:
        return {}
    match = _compiled(wording.fields_regex).match(input_text)
    return None if match is None else match.groupdict(default="")


@functools.cache
def _compiled(regex: str) -> re.Pattern[str]:
    return re.compile(regex)


def _answer_words(wording: Wording, input_text: str) -> dict[str, tuple[str, str]] | None:
    """Return {normalised label: (label, word)} on this input; None when the words are not to be had or not distinct."""
    assert wording.answers is not None
    fields = _fields(wording, input_text)
    if fields is None:
        return None
    # Without a regex there are no fields, and a brace in an answer is a brace.
    words = {
        normalise_answer(label): (label, _fill(word, fields) if wording.fields_regex else word)
        for label, word in wording.answers.items()
    }
    distinct = {normalise_answer(word) for _, word in words.values()}
    return words if len(distinct) == len(words) else None


def _fill(template: str, fields: Mapping[str, str]) -> str:
    """Replace {name} by its field and {{ }} by braces, in one pass: braces inside a field's value stay as they are."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        return fields[name] if name is not None else match[0][0]

    return _TOKEN.sub(value, template)


def bare_text(wording: Wording) -> str:
    """Return the wording's own words: a template without its fields."""
    if wording.kind == "prefix":
        return wording.text
    return " ".join(_TOKEN.sub(lambda match: " " if match[1] else match[0][0], wording.text).split())


# Files of wordings


@dataclasses.dataclass(frozen=True, slots=True)
class WordingFiles:
    """What files of wordings hold; `with_split` are the (task, id) whose row says in which split they belong."""

    wordings: list[Wording]
    dropped: list[dict[str, Any]]
    with_split: frozenset[tuple[str, str]]


def load_wordings(paths: Iterable[str | Path], tasks: Mapping[str, Task]) -> tuple[list[Wording], list[dict[str, Any]]]:
    """Return the wordings of these tasks in files, and rows {task, id, text, reason} for those of other tasks.

    Raises UserError with file, line and key.
    """
    files = read_wordings(paths, tasks)
    return files.wordings, files.dropped


def read_wordings(paths: Iterable[str | Path], tasks: Mapping[str, Task]) -> WordingFiles:
    """Read JSONL files of wordings; see `load_wordings`.

    A flat row is a Wording; a nested row holds `instructions` and `templates` of one task, which share `fields_regex`
    and `options`.
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
                wordings.append(wording)
                if not nested and row.get("split") is not None:
                    with_split.add(key)
        _check_overlap(path, in_file, tasks)
    return WordingFiles(wordings, dropped, frozenset(with_split))


def _check_overlap(path: Path, in_file: set[str], tasks: Mapping[str, Task]) -> None:
    if not in_file:
        raise UserError(f"{path}: holds no wordings; JSONL rows with task, id and text were expected")
    if in_file.isdisjoint(tasks):
        raise UserError(
            f"{path}: none of its {len(in_file)} tasks is among the {len(tasks)} of this run; the file has"
            f" {_some(in_file)}, the run has {_some(tasks)}: name the tasks in the file as the run does"
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
    if kind not in ("prefix", "template"):
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
    for key, suffix in zip(_NESTED_KEYS, _PAIR_SUFFIXES, strict=True):
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
    return value


def _answers(row: dict[str, Any], where: str) -> dict[str, str] | None:
    value = row.get("answers")
    if value is None:
        return None
    if not isinstance(value, dict) or not value or not all(isinstance(word, str) and word for word in value.values()):
        raise UserError(f"{where}: answers={_shown(value)}; an object from gold answers to words was expected, or null")
    for label, other in _repeated(value).items():
        raise UserError(
            f"{where}: answers gives {other!r} and {label!r} the same word {value[label]!r}, so that a response could"
            " not be mapped back; give every answer a word of its own"
        )
    return value


def _repeated(answers: dict[str, str]) -> dict[str, str]:
    """Return {label: earlier label} where both get the same word; spellings of one label are one label."""
    first: dict[str, str] = {}
    repeated = {}
    for label, word in answers.items():
        earlier = first.setdefault(normalise_answer(word), label)
        if normalise_answer(earlier) != normalise_answer(label):
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
    return text.replace(_OPTIONS_FIELD, "\n".join(["OPTIONS:", *(f"- {option}" for option in options)]))


def _check_fields(wording: Wording, where: str) -> None:
    """Raise UserError for a bad regex, a template without one, or a field that it lacks."""
    if wording.fields_regex is None:
        if wording.kind == "template":
            raise UserError(f"{where}: a template needs fields_regex, whose named groups are its fields; add it")
        return
    try:
        groups = re.compile(wording.fields_regex).groupindex
    except re.error as error:
        raise UserError(f"{where}: fields_regex={wording.fields_regex!r} is no regular expression: {error}") from error
    texts = {"text": wording.text} if wording.kind == "template" else {}
    texts |= {f"answers[{label!r}]": word for label, word in (wording.answers or {}).items()}
    for key, text in texts.items():
        for match in _TOKEN.finditer(text):
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


# Splits


def base_id(wording: Wording) -> str:
    """Return the id that an instruction and its template share."""
    for suffix in _PAIR_SUFFIXES:
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

    The original is train; ids in `fixed` keep the split they have, and count. The others are taken in hash order,
    those of files first, then generated ones; an instruction and its template stay together. Test takes up to
    `num_test`, but at most half (rounded up) of the wordings from files and of the generated ones; dev up to `num_dev`,
    but at most half (rounded down) of what then remains; train gets the rest. Of an unseen task all wordings from files
    are test; generated ones fill up to `num_test`, and more of them are train, where nothing reads them.
    """
    splits: dict[str, WordingSplit] = {w.id: w.split for w in wordings if w.id in fixed}
    splits |= {w.id: "train" for w in wordings if w.source == ORIGINAL}
    for generated in (False, True):
        group = [w for w in wordings if w.source != ORIGINAL and (w.source == GENERATED) == generated]
        if not task.seen and not generated:
            splits |= {w.id: "test" for w in group if w.id not in splits}
            continue
        free = [w for w in group if w.id not in splits]
        taken = list(splits.values())
        # Half of the whole group, less what `fixed` put into test already.
        half = math.ceil(len(group) / 2) - sum(splits.get(w.id) == "test" for w in group)
        half = half if task.seen else len(group)
        test = _take(free, min(num_test - taken.count("test"), half), task, seed)
        free = [w for w in free if w.id not in test]
        dev_limit = min(num_dev - taken.count("dev"), len(free) // 2) if task.seen else 0
        dev = _take(free, dev_limit, task, seed)
        for wording in group:
            splits.setdefault(wording.id, "test" if wording.id in test else "dev" if wording.id in dev else "train")
    return [dataclasses.replace(w, split=splits[w.id]) for w in wordings]


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
