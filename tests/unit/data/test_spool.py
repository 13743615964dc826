"""Rows on disk are those of a list, also while more are added and two readers read at once; equal numbers are found."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import NamedTuple

import pytest

from coalign.data import spool
from coalign.data.spool import Spool, equal_places


class Pair(NamedTuple):
    name: str
    texts: tuple[str, ...]
    number: int = 0


ROWS = [Pair(f"row {i}", ("", "ünï\ud800"[: i % 5], "x" * i), i) for i in range(1200)]


@pytest.mark.parametrize("block", [1, 2**20])
def test_spool_reads_like_a_list(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "BYTES_READ", block)
    held = Spool(Pair, tmp_path)
    for row in ROWS[:600]:
        held.append(row)
    assert list(held) == ROWS[:600]
    for row, again in zip(ROWS[600:], held, strict=False):
        held.append(row)  # while others are read
        assert again == ROWS[again.number]
    assert len(held) == 1200
    assert [held[5], held[-1], *held[10:14]] == [ROWS[5], ROWS[-1], *ROWS[10:14]]
    assert all(a == b == c for a, b, c in zip(held, held, ROWS, strict=True))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IndexError):
        held[1200]


def test_empty_spool_and_a_folder_that_is_none(tmp_path: Path) -> None:
    assert list(Spool(Pair)) == []
    assert not Spool(Pair)
    with pytest.raises(FileNotFoundError):
        Spool(Pair, tmp_path / "none")


def test_equal_places() -> None:
    assert sorted(equal_places(array("q", [5, -7, 5, 0, -7, 5, 2**62]))) == [[0, 2, 5], [1, 4]]
    assert list(equal_places(array("q"))) == []
