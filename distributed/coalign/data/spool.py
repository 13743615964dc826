"""Rows on disk that are read like a list, and the places of equal numbers: prepare's tools for millions of rows.

Knows neither layouts nor splits.
"""

from __future__ import annotations

import bisect
import contextlib
import marshal
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

Element = TypeVar("Element", bound=NamedTuple)
BYTES_READ = 2**20  # at once


class Spool(Sequence[Element]):
    """Named tuples of strings, numbers and tuples, in a temporary file without a name: 8 bytes of memory per row.

    The file lies in `folder` (default: the system's folder for temporary files) and goes with the object. Rows may be
    added while others are read. Raises OSError when the disk is full.
    """

    def __init__(self, kind: type[Element], folder: Path | None = None) -> None:
        self._kind = kind
        self._folder = folder or Path(tempfile.gettempdir())
        self._stream = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the object)
        self._ends = array("Q", [0])
        self._at_end = True

    def append(self, row: Element) -> None:
        """Add a row at the end."""
        if not self._at_end:
            with self._named_errors():
                self._stream.seek(self._ends[-1])
            self._at_end = True
        data = marshal.dumps(tuple(row))
        with self._named_errors():
            self._stream.write(data)
        self._ends.append(self._ends[-1] + len(data))

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Say in an OSError, such as a full disk, where the file without a name lies."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self._folder)
            raise

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Element: ...
    @overload
    def __getitem__(self, index: slice) -> list[Element]: ...
    def __getitem__(self, index: int | slice) -> Element | list[Element]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return next(self._read(place, place + 1))

    def __iter__(self) -> Iterator[Element]:
        start = 0
        while start < len(self):
            end = bisect.bisect_right(self._ends, self._ends[start] + BYTES_READ, lo=start) - 1
            end = max(start + 1, end)
            yield from self._read(start, end)
            start = end

    def _read(self, start: int, end: int) -> Iterator[Element]:
        first = self._ends[start]
        self._at_end = False
        with self._named_errors():
            self._stream.seek(first)  # writes what is still in memory
            data = memoryview(self._stream.read(self._ends[end] - first))
        for index in range(start, end):
            values: Any = marshal.loads(data[self._ends[index] - first : self._ends[index + 1] - first])
            yield tuple.__new__(self._kind, values)


def equal_places(numbers: array[int]) -> Iterator[list[int]]:
    """Yield, for each 64-bit number that occurs more than once, its places in ascending order."""
    numbers_N = np.asarray(numbers, np.int64)
    order_N = np.argsort(numbers_N, kind="stable")
    sorted_N = numbers_N[order_N]
    edges = np.flatnonzero(np.concatenate(([True], sorted_N[1:] != sorted_N[:-1], [True])))
    sizes = np.diff(edges)
    many = np.flatnonzero(sizes > 1)
    for start, size in zip(edges[many].tolist(), sizes[many].tolist(), strict=True):
        yield order_N[start : start + size].tolist()
