"""Files and folders that appear complete or not at all, and free space for them.

Knows no step.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from coalign.errors import UserError
from coalign.records import dump_line


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: temporary file, fsync, rename."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees either the old one or the complete new one."""
    with _complete_file(path) as stream:
        stream.write(text)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write JSONL atomically and return the number of rows."""
    count = 0
    with _complete_file(path) as stream:
        for row in rows:
            stream.write(dump_line(row))
            count += 1
    return count


@contextlib.contextmanager
def _complete_file(path: Path) -> Iterator[TextIO]:
    """Open a temporary file beside `path`: renamed to it when everything is on the disk, removed on an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # on a full disk it would occupy the last of the space
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def require_free_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise UserError when the disk that holds `folder` has less than `num_bytes` free."""
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(
            f"{existing}: {what} needs {num_bytes / 2**20:.0f} MiB, only {free / 2**20:.0f} MiB are free;"
            " free some space or set run.folder to another disk"
        )


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Make a folder appear complete or not at all: `write` fills a temporary one beside it, which is then renamed."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
