"""Data sets that Hugging Face's library reads: CSV, JSON, Parquet and Arrow files, saved data sets, the hub.

The only import of datasets, made when such a data set is read. Knows neither tasks nor splits.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coalign.config import SourceTable
from coalign.data.instances import DroppedInstance, Instance, Layout, parse_row
from coalign.errors import UserError

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
BATCH_ROWS = 1000


def list_data_files(root: Path) -> list[Path]:
    """Return a local data set's files, the one or all below a folder, without hidden ones."""
    if root.is_file():
        return [root]
    found = (path for path in root.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))


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
    for batch in dataset.iter(batch_size=BATCH_ROWS):
        for values in zip(*(batch[name] for name in columns), strict=True):
            number += 1
            row = {name: value for name, value in zip(columns, values, strict=True) if value is not None}
            for name in labels.keys() & row.keys():
                # -1 is the library's mark of a missing label.
                row[name] = labels[name].int2str(row[name]) if row[name] >= 0 else ""
            yield parse_row(row, f"{source.path}, row {number}", layout)


def _load_dataset(source: SourceTable, kind: str, root: Path) -> Any:
    """Return a datasets.Dataset. Raises UserError in place of the library's own errors."""
    import datasets

    datasets.disable_progress_bars()
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
            return datasets.load_dataset(source.path, source.name or None, split=source.split)
        tables = [file for file in list_data_files(root) if file.suffix in (".csv", ".tsv")]
        options = _csv_options(datasets, tables[0]) if tables else {}
        if root.is_file():
            files = {source.split: str(root)}
            return datasets.load_dataset(BUILDERS[root.suffix], data_files=files, split=source.split, **options)
        return datasets.load_dataset(str(root), source.name or None, split=source.split, **options)
    except (OSError, ValueError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        seen = "no such file or folder here, nor on the hub" if kind == "hub" else "not readable"
        what = f"{source.path}: {seen} ({type(error).__name__}: {reason})"
        raise UserError(f"{what}; check path, name and split") from error


def _csv_options(datasets: Any, path: Path) -> dict[str, Any]:
    """Return options with which every column is text: answers such as "007", "NA" or "null" must stay as written."""
    separator = "\t" if path.suffix == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as stream:
        header = next(csv.reader(stream, delimiter=separator), [])
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "sep": separator}
