"""The benchmarks' rows against other projects: on a tiny shape, both sides find the same."""

from __future__ import annotations

import pytest

from benchmarks.bench import PEERS
from benchmarks.rows import measure_row

pytestmark = [pytest.mark.peers, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("name", list(PEERS))
def test_both_sides_of_a_row_find_the_same(name: str) -> None:
    for row in PEERS[name](True):
        found = measure_row(row, 1)
        assert found["same_result"] and found["plain"] > 0 and found["ours"] > 0, row.name
