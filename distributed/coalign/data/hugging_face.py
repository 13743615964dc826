"""Data sets that Hugging Face's library reads: CSV, JSON, Parquet and Arrow files, saved data sets, the hub.

The only import of datasets, made when such a data set is read. Knows neither tasks nor splits.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
import os
import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coalign.config import SourceTable
from coalign.data.instances import DroppedInstance, Instance, Layout, parse_row
from coalign.errors import UserError
from coalign.files import decode, open_file, require_shallow, require_utf8

logger = logging.getLogger("coalign")

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
BATCH_ROWS = 1000
HEAD = 1 << 16  # bytes of a file in which mistakes are looked for that the library names badly


def list_data_files(root: Path) -> list[Path]:
    """Return a local data set's files, the one or all below a folder, without hidden ones."""
    if root.is_file():
        return [root]
    found = (path for path in root.rglob("*") if path.is_file())
    files = sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))
    for path in files:
        require_utf8(path)
    return files


def read_data_set(source: SourceTable, kind: str, root: Path) -> Iterator[Instance | DroppedInstance]:
    """Yield the rows of a data set of `kind` "hf" (files), "saved" (save_to_disk) or "hub". Raises UserError."""
    dataset = _load_dataset(source, kind, root)
    columns = list(dataset.column_names)
    has_columns = "instruction" in columns and ("output" in columns or "outputs" in columns)
    if "messages" not in columns and not has_columns:
        raise UserError(
            f"{source.path}: the columns are {', '.join(columns) or 'none'}; expected instruction and"
            " output (or outputs), optionally input and task, or else messages; rename them"
        )
    labels = {name: feature for name, feature in dataset.features.items() if hasattr(feature, "int2str")}
    layout: Layout = "auto" if "messages" in columns else "columns"
    number = 0
    for batch in _batches(dataset, source):
        for values in zip(*(batch[name] for name in columns), strict=True):
            number += 1
            place = f"{source.path}, row {number}"
            row = {name: value for name, value in zip(columns, values, strict=True) if value is not None}
            for name in labels.keys() & row.keys():
                try:  # -1 is the library's mark of a missing label
                    row[name] = labels[name].int2str(row[name]) if row[name] >= 0 else ""
                except (ValueError, TypeError) as error:
                    raise UserError(f"{place}: {name}={row[name]!r} is no class of this column; {error}") from error
            yield parse_row(row, place, layout)


def _batches(dataset: Any, source: SourceTable) -> Iterator[Any]:
    """Yield a data set's batches. Raises UserError when the library can't read one."""
    try:
        yield from dataset.iter(batch_size=BATCH_ROWS)
    except Exception as error:
        raise _not_readable(source, "not readable", error) from error


def _require_objects(head: bytes, place: str) -> None:
    """Raise UserError unless the first bytes of a JSON file are UTF-8, cut anywhere, and begin an object or a list.

    The library's parser ends this process at a null in the place of the first row.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        text = decode(head, place, start=True)
    if text.strip("\0 \t\r\n")[:1] not in ("{", "["):
        raise UserError(f"{place}: malformed JSON (an object or a list of objects was expected); check data.path")


def _not_readable(source: SourceTable, what: str, error: Exception) -> UserError:
    reason = str(error.__cause__ or error).strip().partition("\n")[0]
    return UserError(f"{source.path}: {what} ({type(error).__name__}: {reason}); check path, name and split")


def _load_dataset(source: SourceTable, kind: str, root: Path) -> Any:
    """Return a datasets.Dataset. Raises UserError in place of the library's own errors."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs comes as an exception as well
    try:
        if kind == "saved":
            saved = datasets.load_from_disk(str(root))
            if isinstance(saved, datasets.Dataset):
                return saved
            if source.split not in saved:
                raise UserError(
                    f"{root}: no split {source.split!r}; it has {', '.join(saved)}, set split in data.sources"
                )
            return saved[source.split]
        if kind == "hub":
            logger.info("%s: no such file or folder here; looking for a data set of this name on the hub", source.path)
            _stay_offline_without_hub()
            return datasets.load_dataset(source.path, source.name or None, split=source.split)
        tables = [file for file in list_data_files(root) if file.suffix in (".csv", ".tsv")]
        options = _csv_options(datasets, tables[0]) if tables else {}
        for file in list_data_files(root):
            with open_file(file, "data.path") as stream:  # the library would wait for a pipe
                head = stream.read(HEAD)
            if BUILDERS.get(file.suffix) == "json":
                _require_objects(head, str(file))
                require_shallow(file, "data.path")  # the library's parser would end this process
        if root.is_file():
            files = {source.split: str(root)}
            return datasets.load_dataset(BUILDERS[root.suffix], data_files=files, split=source.split, **options)
        return datasets.load_dataset(str(root), source.name or None, split=source.split, **options)
    except UserError:
        raise
    except Exception as error:  # whatever the library and the formats below it raise
        seen = "no such file or folder here, nor on the hub" if kind == "hub" else "not readable"
        raise _not_readable(source, seen, error) from error


def _stay_offline_without_hub() -> None:
    """Let the libraries look in their cache alone when no name service knows the hub: they would retry for long."""
    import datasets
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _csv_options(datasets: Any, path: Path) -> dict[str, Any]:
    """Return options with which every column is text: answers such as "007", "NA" or "null" must stay as written."""
    separator = "\t" if path.suffix == ".tsv" else ","
    with open_file(path, "data.path") as raw:
        decode(raw.readline(1 << 20), str(path), start=True)
    with open_file(path, "data.path") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
        header = next(csv.reader(stream, delimiter=separator), [])
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "sep": separator}
