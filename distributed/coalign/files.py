"""Files that people name, opened for reading: whatever goes wrong becomes one UserError with the path and its key.

Every reader of such a file goes through here. Knows neither settings nor what a file holds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from coalign.errors import UserError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z")  # suffixes
MAX_SHOWN = 200  # characters of a path in an error
MAX_DEPTH = 1000  # of nested brackets in JSON, about where Python's own parser gives up
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_NOT_REGULAR = "not a regular file but a pipe, a socket or a device"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}
_REASONS = {
    errno.ENOENT: "no such file",
    errno.EISDIR: "a file was expected, this is a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its links lead in a circle",
}


def reason_of(error: BaseException) -> str:
    """Return what an OSError or ValueError about a path says, in lower case."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _REASONS:
        return _REASONS[number]
    words = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return words[:1].lower() + words[1:]


def shown(path: object) -> str:
    """Return a path as an error shows it: the middle of a very long one is left out."""
    text = str(path)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]}...{text[-MAX_SHOWN // 2 :]}"


@contextlib.contextmanager
def path_errors(path: Path, key: str = "") -> Iterator[None]:
    """Turn any OSError or ValueError of a block that only looks at `path` into a UserError; `key` is what names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        place = (error.filename if isinstance(error, OSError) else None) or path
        raise UserError(f"{shown(place)}: {reason_of(error)}; check {key or 'the path'}") from error


@contextlib.contextmanager
def open_file(path: Path, key: str = "") -> Iterator[BinaryIO]:
    """Open a regular file for reading in a block that only reads it; `key` names the setting that named the file.

    Raises UserError when it can't be opened or read: missing, forbidden, a folder, a pipe or a device, a loop of links.
    """
    with contextlib.ExitStack() as stack:
        with path_errors(path, key):
            _require_regular(path)
            stream = stack.enter_context(path.open("rb"))
        try:
            yield stream
        except OSError as error:
            raise UserError(f"{shown(path)}: {reason_of(error)}; check {key or 'the path'}") from error


def _require_regular(path: Path) -> None:
    """Raise OSError unless `path` is a regular file: a pipe would be waited for, a device may never end."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, _NOT_REGULAR, str(path))


def is_plain(path: Path) -> bool:
    """Return whether a path is a regular file or a folder. Raises UserError for a pipe, a socket or a device."""
    if path.is_file() or path.is_dir():
        return True
    if path.exists():
        raise UserError(f"{path}: {_NOT_REGULAR}; remove it")
    return False


def list_folder(folder: Path, key: str = "") -> list[Path]:
    """Return what lies in a folder, by name. Raises UserError when it can't be read or a name is not UTF-8."""
    with path_errors(folder, key):
        found = sorted(folder.iterdir())
    for path in found:
        require_utf8(path)
    return found


def require_utf8(path: Path) -> None:
    """Raise UserError for a path that is not UTF-8: names of files become names of tasks."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: this name is not UTF-8; rename it") from error


def read_bytes(path: Path, key: str = "") -> bytes:
    """Return the content of a file. Raises UserError as `open_file` does."""
    with open_file(path, key) as stream:
        return stream.read()


def read_text(path: Path, key: str = "") -> str:
    """Return the content of a UTF-8 file, without a byte order mark. Raises UserError, for other bytes too."""
    return decode(read_bytes(path, key), str(path), start=True)


def decode(raw: bytes, place: str, *, start: bool) -> str:
    """Return UTF-8 as text; `start` says whether a file begins with it. Raises UserError that begins with `place`."""
    try:
        return raw.decode("utf-8-sig" if start else "utf-8")
    except UnicodeDecodeError as error:
        packed = next((kind for magic, kind in _COMPRESSED.items() if start and raw.startswith(magic)), None)
        if packed:
            raise UserError(f"{place}: the file is compressed ({packed}); unpack it first") from error
        raise UserError(f"{place}: byte {error.start} is not UTF-8; is this a text file in UTF-8?") from error


def read_json(path: Path, key: str = "", *, distinct: bool = False) -> Any:
    """Return what a JSON file holds; `distinct` as in `parse_json`. Raises UserError with the place of a mistake."""
    return parse_json(read_text(path, key), str(path), distinct=distinct)


def parse_json(text: str, place: str, *, distinct: bool = False) -> Any:
    """Return the value of a JSON text. Raises UserError, which begins with `place`.

    With `distinct` an object that has a key twice is an error too, since the last one would win unseen.
    """
    try:
        return _DISTINCT.decode(text) if distinct else json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{place}{line}: malformed JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise UserError(f"{place}: malformed JSON (brackets are nested too deeply)") from error
    except _RepeatedKeyError as error:
        raise UserError(f"{place}: {error}") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise UserError(f"{place}: malformed JSON ({str(error).partition(';')[0]})") from error


def require_shallow(path: Path, key: str = "") -> None:
    """Raise UserError for a JSON file whose brackets are nested so deeply that a parser in C may overflow its stack."""
    with open_file(path, key) as stream:
        # Brackets inside strings count here; few files need the second look, which leaves strings out.
        if _depth(block.translate(None, _NO_BRACKETS) for block in iter(lambda: stream.read(1 << 20), b"")) < MAX_DEPTH:
            return
        stream.seek(0)
        if _depth(match[0] for match in _BRACKETS.finditer(stream.read()) if match[0][:1] != b'"') >= MAX_DEPTH:
            raise UserError(f"{shown(path)}: malformed JSON (brackets are nested too deeply)")


def _depth(pieces: Iterable[bytes]) -> int:
    """Return how deeply the brackets of a text are nested, given nothing but its brackets."""
    depth = deepest = 0
    for piece in pieces:
        for byte in piece:
            depth = depth + 1 if byte in b"[{" else max(0, depth - 1)
            deepest = max(deepest, depth)
    return deepest


class _RepeatedKeyError(ValueError):
    """A JSON object that has the same key twice."""


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise _RepeatedKeyError(f"the key {repeated!r} stands twice in one object; keep one of them")
    return found


_DISTINCT = json.JSONDecoder(object_pairs_hook=_distinct_keys)  # json.loads would make one per line
