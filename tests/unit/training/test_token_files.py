"""Token ids on disk: what is read is what was written, made once, whole or not at all, by any number of processes."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from coalign.errors import UserError
from coalign.training.forked_map import forked_map
from coalign.training.micro_batches import Item, row_tokens
from coalign.training.reference import _stored_logps
from coalign.training.token_files import TokenRows, TokenWriter, as_rows, columns_of, open_rows, prepare_rows
from unit.waiting import until

GROUPS = [
    Item("e1 under a", (1, 2, 3), ((4,), (5, 6)), (2, 0), 0),
    Item("é2 under ü", (7,), ((8, 9, 10), (11,), (12, 13)), (0, 1, 2), 2),
    Item("e3 under a", (14, 15), ((2_000_000_000,),), (1,), 0),
]
ROWS = [dataclasses.replace(item, responses=item.responses[:1], rewards=(), best=0) for item in GROUPS]


def write(folder: Path, parts: list[list[Item]], digest: str = "d", order: list[int] | None = None) -> TokenRows:
    """Write items a part at a time and open them."""

    def encode(writer: TokenWriter) -> None:
        for part in parts:
            writer.add(columns_of(part))
        writer.order = None if order is None else np.array(order)

    prepare_rows(folder, digest, encode)
    return open_rows(folder)


@pytest.mark.parametrize("items", [GROUPS, ROWS], ids=["groups", "rows"])
def test_items_are_read_as_they_were_written(items: list[Item], tmp_path: Path) -> None:
    """In any parts, empty ones too, in their order or another; the arrays are maps and hold no pickle."""
    for number, parts in enumerate(([items], [items[:1], [], items[1:]])):
        found = write(tmp_path / str(number), parts)
        assert list(found) == items and found[-1] == items[-1] and found[1:] == items[1:]
        assert all(isinstance(column, np.memmap) for column in found.columns.values())
        with pytest.raises(IndexError):
            found[3]
    ordered = write(tmp_path / "ordered", [items], order=[2, 0, 2, 1])
    assert list(ordered) == [items[i] for i in (2, 0, 2, 1)]
    assert list(ordered.take(np.array([3, 0]))) == [items[1], items[2]]
    assert list(as_rows(items)) == items and as_rows(ordered) is ordered


def test_lengths_are_known_without_reading_items(tmp_path: Path) -> None:
    """They are what an item says itself, in the order asked for."""
    found = write(tmp_path / "rows", [GROUPS], order=[2, 0, 1, 1])
    sizes = found.sizes
    for index, item in enumerate(found):
        assert sizes.longest[index] == item.longest() and sizes.responses[index] == len(item.responses)
        assert sizes.prompt[index] == len(item.prompt)
        assert sizes.shared_tokens[index] == row_tokens(item, True)[0]


def test_reference_log_probs_go_with_their_responses() -> None:
    items = as_rows(GROUPS).with_reference(np.array([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]))
    assert [item.reference for item in items] == [(-1.0, -2.0), (-3.0, -4.0, -5.0), (-6.0,)]
    assert items.take(np.array([2, 1]))[1].reference == (-3.0, -4.0, -5.0)


def test_rows_are_made_once_and_anew_when_they_are_not_the_same(tmp_path: Path) -> None:
    """A whole folder of the same digest is kept; another digest, or a file cut short, has it made again."""
    folder = tmp_path / "rows"
    write(folder, [GROUPS])
    assert list(write(folder, [ROWS])) == GROUPS
    assert list(write(folder, [ROWS], digest="other")) == ROWS
    (folder / "ids.npy").write_bytes((folder / "ids.npy").read_bytes()[:-4])
    assert list(write(folder, [GROUPS], digest="other")) == GROUPS

    def fail(writer: TokenWriter) -> None:
        writer.add(columns_of(ROWS))
        raise UserError("too long")

    with pytest.raises(UserError):
        prepare_rows(folder, "third", fail)
    assert list(open_rows(folder)) == GROUPS and [path.name for path in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize("name", ["tokens.json", "ids.npy", "row_starts.npy"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"\x00" * 200, b"[" * 100_000])
def test_damaged_rows_are_made_anew(name: str, content: bytes, tmp_path: Path) -> None:
    items = [Item("one", (1, 2), ((3,),)), Item("two", (4,), ((5, 6),))]
    written = list(write(tmp_path / "rows", [items]))
    (tmp_path / "rows" / name).write_bytes(content)
    assert list(write(tmp_path / "rows", [items])) == written == items


@pytest.mark.parametrize(
    "text",
    ["", "{", "3\n", '{"name": "one", "logps": [0.5]}\n', '{"name": "one"}\n{"name": "two", "logps": 3}\n'],
)
def test_stored_reference_log_probs_are_used_only_whole(text: str, tmp_path: Path) -> None:
    items = [Item("one", (1, 2), ((3,),)), Item("two", (4,), ((5, 6), (7,)))]
    path = tmp_path / "reference.jsonl"
    assert _stored_logps(path, items) is None
    path.write_text(text)
    assert _stored_logps(path, items) is None
    path.write_text('{"name": "two", "logps": [-0.25, -1.5]}\n{"name": "one", "logps": [-0.5]}\n')
    assert _stored_logps(path, items) == [(-0.5,), (-0.25, -1.5)]


def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def test_processes_work_in_order_and_report_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    two_cores(monkeypatch)
    here = os.getpid()
    chunks = [[n] for n in range(20)]
    found = list(forked_map(lambda chunk: (chunk, os.getpid() != here), chunks, "encoding"))
    assert found == [(chunk, True) for chunk in chunks]

    def refuse(chunk: Sequence[int]) -> Sequence[int]:
        if 3 in chunk:
            raise UserError("row 3 is too long")
        return chunk

    with pytest.raises(UserError, match="row 3"):
        list(forked_map(refuse, chunks, "encoding"))


def test_processes_end_with_the_one_that_forked_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, it leaves nobody behind who would hold the step's lock."""
    two_cores(monkeypatch)

    def work(chunk: Sequence[int]) -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(600)

    parent = os.fork()
    if not parent:
        list(forked_map(work, [[0], [1]], "encoding"))
        os._exit(1)
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    children = [Path("/proc", path.name) for path in tmp_path.iterdir()]
    assert all(path.exists() for path in children)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until(lambda: not any(path.exists() for path in children))
