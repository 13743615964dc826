"""Instruction sets in: finds the files of each source, reads them, names tasks and mixes the sources.

Knows no splits, and no library of data sets.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from coalign.config import DataTable, SourceTable
from coalign.data.hugging_face import BUILDERS, list_data_files, read_data_set
from coalign.data.instances import (
    DroppedInstance,
    FreeNames,
    Instance,
    Layout,
    list_task_files,
    parse_row,
    read_task_file,
)
from coalign.data.spool import Spool, equal_places
from coalign.errors import UserError
from coalign.files import COMPRESSED, list_folder, open_file, path_errors, shown
from coalign.records import Task, read_rows
from coalign.runs.digests import digest_file, digest_value
from coalign.text import loose_key, unit_hash

OTHER_SUFFIXES = (".txt", ".toml", ".xlsx", ".xml", ".yaml", ".yml", ".md", ".ndjson", ".jsonlines", ".bak")
SAVED_MARKERS = ("dataset_dict.json", "dataset_info.json")
LAYOUTS: dict[str, Layout] = {"auto": "auto", "jsonl": "columns", "messages": "messages"}
_SLUG_WORD = re.compile(r"\w+(?:['’]\w+)*")  # not text.words: a task keeps its name from version to version
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclasses.dataclass(slots=True)
class Collection:
    """The contents of all sources. Every instance names a key of `tasks`; ids are unique or empty."""

    tasks: dict[str, Task]
    instances: Spool[Instance]
    dropped: Spool[DroppedInstance]


def read_sources(table: DataTable, folder: Path | None = None) -> Collection:
    """Read every source of the table. Raises UserError for the first mistake, with file and line.

    The rows lie in temporary files in `folder`, see `Spool`. Memory holds the tasks and 16 bytes per row; with several
    sources also 80 bytes per row that has an id of its own.
    """
    collection = Collection({}, Spool(Instance, folder), Spool(DroppedInstance, folder))
    sources = list_sources(table)
    ids = FreeNames() if len(sources) > 1 else None
    for source in sources:
        before, left_out = len(collection.instances), len(collection.dropped)
        _add_source(collection, _take_rows(source, collection.dropped, folder), source, ids)
        if len(collection.instances) == before:
            raise UserError(_explain_nothing(source, collection.dropped[left_out:]))
    return collection


def _explain_nothing(source: SourceTable, dropped: Sequence[DroppedInstance]) -> str:
    """Return why a source without a single instance has none, given what was left out of it."""
    reasons = Counter(row.reason for row in dropped)
    found = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    if reasons.keys() == {"multi_turn"}:
        return (
            f"{source.path}: all {len(dropped)} rows were left out as multi_turn: only conversations of one user's and"
            " one assistant's message can be used; cut them to one turn"
        )
    return f"{source.path}: it holds no instances{f' ({found})' if found else ''}; check the path and data.format"


def digest_sources(table: DataTable) -> str:
    """Return one SHA-256 over what will be read: names within each source and contents, not the source's location.

    A hub data set counts by its name, configuration and split alone.
    """
    parts: list[Any] = []
    for source in list_sources(table):
        kind, root = find_format(source), Path(source.path)
        if kind == "hub":
            parts.append([source.path, source.name, source.split])
        elif kind == "sni":
            tasks, lists, _ = list_task_files(root)
            parts.append([_describe_file(path, root) for path in [*lists, *tasks]])
        else:
            parts.append([_describe_file(path, root) for path in _list_files(root, kind)])
    return digest_value(parts)


def list_sources(table: DataTable) -> list[SourceTable]:
    """Return data.sources, or data.path as the only source. Raises UserError when neither is set."""
    if not table.path and not table.sources:
        raise UserError(
            'data.path="" names no data; set data.path to a folder, a file or a hub name, or use data.sources'
        )
    return table.sources or [SourceTable(path=table.path, format=table.format)]


def find_format(source: SourceTable) -> str:
    """Return how a source is read: "sni", "rows" (JSONL), "hf" (local files), "saved" (save_to_disk) or "hub".

    Raises UserError for a path that is neither there nor a hub name, or that holds no data.
    """
    path = Path(source.path)
    with path_errors(path, "data.path"):
        exists, is_file, is_folder = path.exists(), path.is_file(), path.is_dir()
    if not exists:
        return _find_hub_name(source, path)
    if is_file:
        return _find_kind_of_file(source, path)
    if not is_folder:
        with open_file(path, "data.path"):  # says what else it is
            pass
    names = list_folder(path, "data.path")
    if source.format == "sni" or (source.format == "auto" and (path / "tasks").is_dir()):
        return "sni"
    if source.format in ("jsonl", "messages") or (source.format == "auto" and any(p.match("*.jsonl") for p in names)):
        return "rows"
    if any((path / marker).exists() for marker in SAVED_MARKERS):
        return "saved"
    if not any(file.suffix in BUILDERS for file in path.rglob("*")):
        packed = next((file for file in names if file.suffix in COMPRESSED), None)
        raise UserError(
            f"{packed}: the file is compressed; unpack it first"
            if packed
            else f"{path}: the folder holds no data; expected tasks/*.json, *.jsonl, or files of {', '.join(BUILDERS)}"
        )
    return "hf"


def _find_hub_name(source: SourceTable, path: Path) -> str:
    # A file suffix, a leading dot or slash, or a first part that exists here mean a path, not a hub name.
    looks_local = path.suffix in (*BUILDERS, *COMPRESSED, *OTHER_SUFFIXES) or (
        len(path.parts) > 1 and Path(path.parts[0]).exists()
    )
    if path.is_symlink() or source.format not in ("auto", "hf") or looks_local or not _HUB_NAME.fullmatch(source.path):
        raise UserError(f"{shown(source.path)}: no such file or folder; check data.path (relative to {Path.cwd()})")
    return "hub"


def _find_kind_of_file(source: SourceTable, path: Path) -> str:
    if source.format == "sni":
        raise UserError(f"{path} is a file; data.format=sni needs the folder that holds tasks/*.json")
    if path.suffix in COMPRESSED:
        raise UserError(f"{path}: the file is compressed; unpack it first")
    if source.format == "hf" or (source.format == "auto" and path.suffix != ".jsonl"):
        if path.suffix not in BUILDERS:
            raise UserError(f"{path}: unknown kind of file; expected {', '.join(BUILDERS)}, or set data.format=jsonl")
        return "hf"
    return "rows"


def _read_source(source: SourceTable) -> Iterator[Instance | DroppedInstance]:
    kind, root = find_format(source), Path(source.path)
    if kind == "sni":
        tasks, _, left_out = list_task_files(root)
        yield from left_out
        for path, seen in tasks.items():
            yield from read_task_file(path, seen)
    elif kind == "rows":
        for path in _list_files(root, kind):
            for number, row in read_rows(path, "data.path"):
                yield parse_row(row, f"{path}, line {number}", LAYOUTS.get(source.format, "auto"))
    else:
        yield from read_data_set(source, kind, root)


def _list_files(root: Path, kind: str) -> list[Path]:
    if root.is_file():
        return [root]
    if kind == "rows":
        files = [path for path in list_folder(root, "data.path") if path.match("*.jsonl")]
        if not files:
            raise UserError(f"{root}: no *.jsonl files in this folder; check data.path and data.format")
        return files
    return list_data_files(root)


def _describe_file(path: Path, root: Path) -> list[Any]:
    name = path.name if path == root else path.relative_to(root).as_posix()
    digest = digest_file(path)  # first: it says what is wrong with a file
    return [name, path.stat().st_size, digest]


def _take_rows(source: SourceTable, dropped: Spool[DroppedInstance], folder: Path | None) -> Iterator[Instance]:
    """Yield the source's rows; with `max_rows` those that are first by a hash of task, instruction and input."""
    rows = _without_dropped(_read_source(source), dropped)
    if not source.max_rows:
        yield from rows
        return
    held, places = Spool(Instance, folder), array("d")
    for row in rows:
        held.append(row)
        places.append(unit_hash("rows", row.task, row.instruction, row.input))
    taken = bytearray(len(held))
    for index in np.argsort(np.asarray(places), kind="stable")[: source.max_rows].tolist():
        taken[index] = True
    for index, row in enumerate(held):
        if taken[index]:
            yield row
        else:
            dropped.append(DroppedInstance("over_max_rows", row.place, row.id))


def _without_dropped(rows: Iterable[Instance | DroppedInstance], dropped: Spool[DroppedInstance]) -> Iterator[Instance]:
    for row in rows:
        if isinstance(row, DroppedInstance):
            dropped.append(row)
        else:
            yield row


def _add_source(collection: Collection, rows: Iterable[Instance], source: SourceTable, ids: FreeNames | None) -> None:
    """Give the rows task ids and unique example ids and add them to the collection.

    `ids` holds the example ids of earlier sources; an id that is among them gets the source's name as a prefix.
    """
    path = Path(source.path)
    origin = path.stem if path.is_file() else path.name
    task_names = FreeNames(collection.tasks)
    earlier = dict(collection.tasks)
    task_ids: dict[tuple[str, str], str] = {}
    own = array("q")
    for row in rows:
        key = (row.task, row.instruction)
        if key not in task_ids:
            task_ids[key] = _add_task(collection.tasks, earlier, task_names, row, origin)
        name = row.id
        if name:
            own.append(hash(name))
            if ids is not None:
                name = ids.take(f"{origin}/{name}" if name in ids else name)
        collection.instances.append(row._replace(task=task_ids[key], id=name))
    repeated = {own[places[0]] for places in equal_places(own)}
    if repeated:
        _check_ids(source, repeated)


def _check_ids(source: SourceTable, hashes: set[int]) -> None:
    """Raise UserError for an id, of those with these hashes, that two rows have."""
    places: dict[str, str] = {}
    for row in _read_source(source):
        if isinstance(row, Instance) and row.id and hash(row.id) in hashes:
            if row.id in places:
                raise UserError(
                    f"{row.place}: the id {row.id!r} is also at {places[row.id]}; ids must be unique, change one"
                )
            places[row.id] = row.place


def _add_task(tasks: dict[str, Task], earlier: dict[str, Task], names: FreeNames, row: Instance, source: str) -> str:
    """Add the row's task and return its id.

    A name that an earlier source used for the same instruction is the same task. If it used the name for another
    instruction, the source's name becomes a prefix. A name that this source used for another instruction gets a number.
    """
    name = row.task or instruction_slug(row.instruction)
    known = earlier.get(name)
    if known is not None and known.instruction == row.instruction:
        tasks[name] = dataclasses.replace(tasks[name], seen=tasks[name].seen and row.seen)
        return name
    identity = names.take(f"{source}/{name}" if known is not None else name)
    tasks[identity] = Task(identity, row.instruction, seen=row.seen, source=source, system=row.system)
    return identity


def instruction_slug(instruction: str) -> str:
    """Return an id for a task that has no name: the instruction's first words and a short hash of the whole."""
    start = (
        "-".join(_SLUG_WORD.findall(unicodedata.normalize("NFKC", instruction).casefold())[:6])[:40].strip("-")
        or "task"
    )
    return f"{start}-{sha256(loose_key(instruction).encode()).hexdigest()[:8]}"
