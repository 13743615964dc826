"""Items as token ids on disk: arrays that every rank maps into its memory, encoded once by all cores of one machine.

Batches are planned from lengths alone, and an item is read when it is used. Knows no text and no tokenizer.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from coalign.runs.atomic_files import replace_folder, write_json, write_rows
from coalign.training.micro_batches import Item

logger = logging.getLogger("coalign")

Array = np.ndarray[Any, Any]
Columns = dict[str, Array]

# A row has one segment for its prompt and one per response; a column X_starts has one entry more than there are X.
COLUMNS = {
    "ids": np.int32,
    "segment_starts": np.int64,
    "row_starts": np.int64,
    "names": np.uint8,  # UTF-8
    "name_starts": np.int64,
    "rewards": np.int32,  # one per response, groups only
    "best": np.int32,  # one per row
    "order": np.int64,  # rows in the order of training
}
STARTS = {"segment_starts": "ids", "row_starts": "segment_starts", "name_starts": "names"}
META = "tokens.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Lengths of items in tokens, and their numbers of responses; one entry per item in each array."""

    prompt: Array
    responses: Array
    response_tokens: Array
    longest_response: Array

    @property
    def longest(self) -> Array:
        """Return the tokens of the prompt and its longest response."""
        return self.prompt + self.longest_response

    @property
    def shared_tokens(self) -> Array:
        """Return the tokens that enter the model, the prompt counted once; a response's last token never enters."""
        return self.prompt + self.response_tokens - self.responses


class TokenRows(Sequence[Item]):
    """Items read from arrays, in a given order. `reference` has one number per response, in the stored order."""

    def __init__(self, columns: Columns, order: Array | None = None, reference: Array | None = None) -> None:
        self.columns = columns
        self.order = columns.get("order") if order is None else order
        self.reference = reference

    def __len__(self) -> int:
        return len(self.columns["row_starts"]) - 1 if self.order is None else len(self.order)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._read(index if self.order is None else int(self.order[index]))

    def _read(self, row: int) -> Item:
        columns = self.columns
        first, end = columns["row_starts"][row : row + 2].tolist()
        bounds = columns["segment_starts"][first : end + 1].tolist()
        ids = columns["ids"][bounds[0] : bounds[-1]].tolist()
        segments = [tuple(ids[a - bounds[0] : b - bounds[0]]) for a, b in itertools.pairwise(bounds)]
        place, name_end = columns["name_starts"][row : row + 2].tolist()
        ranked = slice(first - row, end - row - 1)  # each row before this one has one segment that is no response
        return Item(
            name=columns["names"][place:name_end].tobytes().decode(),
            prompt=segments[0],
            responses=tuple(segments[1:]),
            rewards=tuple(columns["rewards"][ranked].tolist()) if "rewards" in columns else (),
            best=int(columns["best"][row]) if "best" in columns else 0,
            reference=() if self.reference is None else tuple(self.reference[ranked].tolist()),
        )

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Return the lengths of all items, in order."""
        starts = np.asarray(self.columns["row_starts"])
        lengths = np.diff(np.asarray(self.columns["segment_starts"]))
        first = starts[:-1]
        prompt = lengths[first]
        total = np.add.reduceat(lengths, first) - prompt
        lengths[first] = 0
        found = (prompt, np.diff(starts) - 1, total, np.maximum.reduceat(lengths, first))
        return Sizes(*(column if self.order is None else column[self.order] for column in found))

    def take(self, order: Array) -> TokenRows:
        """Return the items at these indices, in this order; an index may repeat."""
        return TokenRows(self.columns, order if self.order is None else self.order[order], self.reference)

    def with_reference(self, reference: Array) -> TokenRows:
        """Return the items with one number per response, for rows in their stored order."""
        assert self.order is None
        return TokenRows(self.columns, None, reference)


def as_rows(items: Sequence[Item]) -> TokenRows:
    """Return items as arrays; TokenRows are returned unchanged."""
    return items if isinstance(items, TokenRows) else TokenRows(columns_of(items))


def columns_of(items: Sequence[Item]) -> Columns:
    """Return items as arrays in memory."""
    segments = [segment for item in items for segment in (item.prompt, *item.responses)]
    names = [item.name.encode() for item in items]
    columns = {
        "ids": np.fromiter(itertools.chain.from_iterable(segments), np.int32),
        "segment_starts": _starts([len(segment) for segment in segments]),
        "row_starts": _starts([1 + len(item.responses) for item in items]),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_starts": _starts([len(name) for name in names]),
    }
    if any(item.rewards for item in items):
        columns["rewards"] = np.array([reward for item in items for reward in item.rewards], np.int32)
        columns["best"] = np.array([item.best for item in items], np.int32)
    return columns


def _starts(lengths: Sequence[int]) -> Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(lengths, np.int64))])


class _Column:
    """A growing one-dimensional .npy file; its header, which holds the length, is rewritten at the end."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._stream: BinaryIO = path.open("wb")
        self.length = 0
        self._header()

    def _header(self) -> None:
        described = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._stream, described)

    def append(self, values: Array) -> None:
        self._stream.write(np.ascontiguousarray(values, self._dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        start = self._stream.tell() - self.length * self._dtype.itemsize
        self._stream.seek(0)
        self._header()
        assert self._stream.tell() == start, "the header must not overwrite the values"
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


class TokenWriter:
    """Appends items to the arrays of a folder.

    Before `finish`, callers may set `order` (rows in the order of training), `counts`, and `dropped` (rows left out).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.order: Array | None = None
        self.counts: dict[str, int] = {}
        self.dropped: list[dict[str, Any]] = []
        self._columns: dict[str, _Column] = {}
        for name in STARTS:
            self._column(name).append(np.zeros(1))

    def _column(self, name: str) -> _Column:
        if name not in self._columns:
            self._columns[name] = _Column(self.folder / f"{name}.npy", COLUMNS[name])
        return self._columns[name]

    @property
    def num_rows(self) -> int:
        """Return the number of items so far."""
        return self._column("row_starts").length - 1

    def add(self, columns: Columns) -> int:
        """Append items and return the number of the first."""
        first = self.num_rows
        before = {name: self._column(of).length - (of in STARTS) for name, of in STARTS.items()}
        for name, values in columns.items():
            self._column(name).append(values[1:] + before[name] if name in before else values)
        return first

    def finish(self, digest: str) -> None:
        """Write order, dropped rows and counts, and close the files."""
        if self.order is not None:
            self._column("order").append(self.order)
        for column in self._columns.values():
            column.close()
        write_rows(self.folder / "dropped.jsonl", self.dropped)
        counts = {**self.counts, "dropped": len(self.dropped)}
        names = sorted(self._columns)
        write_json(self.folder / META, {"format": FORMAT, "digest": digest, "columns": names, "counts": counts})


def prepare_rows(folder: Path, digest: str, encode: Callable[[TokenWriter], None]) -> None:
    """Call `encode` to write a folder of arrays, unless one with the same digest exists.

    The folder appears once it is whole. Called by one process alone.
    """
    if _is_whole(folder, digest):
        logger.info("the rows have been encoded already")
        return

    def write(target: Path) -> None:
        writer = TokenWriter(target)
        encode(writer)
        writer.finish(digest)

    replace_folder(folder, write)


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        return read_meta(folder)["digest"] == digest and len(open_rows(folder)) > 0
    except Exception:  # whatever a missing or damaged file raises; the rows are encoded anew
        return False


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the description of the arrays: {"format", "digest", "columns", "counts"}.

    Raises OSError when it is missing, ValueError when it is no JSON or of another format.
    """
    meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    if meta["format"] != FORMAT:
        raise ValueError(f"{folder} has another format")
    return meta


def open_rows(folder: Path) -> TokenRows:
    """Return the items of a folder; their ids stay on disk until they are read. Raises as `read_meta`."""
    names = read_meta(folder)["columns"]
    return TokenRows({name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names})
