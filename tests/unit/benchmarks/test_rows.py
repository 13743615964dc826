"""The benchmarks: every row builds, both its sides find the same on a tiny shape, and ratios are read the right way.

Rows against other projects are left out, since those are not installed here: test_peer_rows.py tests our side of them,
tests/peers/test_benchmark_rows.py both sides.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch

from benchmarks import gpu
from benchmarks.bench import BUILDERS, SOURCES
from benchmarks.lengths import PATH, lengths
from benchmarks.networks import TINY, Shape
from benchmarks.rows import Row, Side, cpu_seconds, measure_row, reported, table_line
from coalign.training.micro_batches import Item

STARTED = {"ray": [pytest.mark.slow, pytest.mark.ray], "ranks": [pytest.mark.slow, pytest.mark.deepspeed]}


@pytest.fixture(autouse=True)
def _sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let processes that rows start import this tree."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(SOURCES))
    yield


@pytest.mark.parametrize("name", [pytest.param(name, marks=STARTED.get(name, ())) for name in BUILDERS])
def test_both_sides_of_a_row_find_the_same(name: str) -> None:
    rows = BUILDERS[name](True)
    assert rows
    for row in rows:
        found = measure_row(row, 1)
        assert found["same_result"], row.name
        assert found["plain"] >= 0 and found["ours"] >= 0 and row.against in table_line(found)


@pytest.mark.parametrize("table", gpu.TABLES)
def test_rows_for_a_gpu_find_the_same_on_both_sides(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, tiny and in float32, where blocks give way to masks; how a device is measured is not seen here."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "DTYPE", torch.float32)
    monkeypatch.setattr(gpu, "POSITIONS", 64)
    monkeypatch.setattr(gpu.attention, "use_blocks", lambda model: False)
    rows = list(gpu.TABLES[table](TINY, 3))
    for row in rows:
        found = measure_row(dataclasses.replace(row, measure=cpu_seconds, warm_up=False), 1)
        assert found["same_result"], row.name
    assert len({row.name + row.against + row.unit for row in rows}) == len(rows) >= 2


def test_model_flops_are_counted_by_hand() -> None:
    """Two layers of width 4 and MLP width 8, a vocabulary of 10: one prompt of 3 tokens with responses of 1 and 3."""
    shape = Shape("by hand", 10, 4, 2, 1, 8)
    group = Item("group", (1, 1, 1), ((5,), (5, 6, 7)), (2, 1))
    matrices = 2 * (4 * 4 * 4 + 3 * 4 * 8) * 5 + 4 * 10 * 4  # 3 + 2 tokens; four are predicted
    pairs = (1 + 2 + 3) + (4 + 5)  # the second response's two inputs see the prompt, the first of them, themselves
    assert gpu.model_flops(shape, [group], lora=False) == 6 * matrices + 12 * 2 * 4 * pairs
    assert gpu.model_flops(shape, [group], lora=True) == 4 * matrices + 12 * 2 * 4 * pairs


def row_of(our_seconds: float, plain_seconds: float, **changed: object) -> Row:
    """Return a row whose sides take so many seconds by their own account."""
    row = Row(
        "a name",
        "another way",
        2.0,
        Side(lambda: {"seconds": our_seconds}),
        Side(lambda: {"seconds": plain_seconds}),
        lambda a, b: a != b,
        measure=reported("seconds"),
    )
    return dataclasses.replace(row, **changed)  # type: ignore[arg-type]


def test_ratio_is_how_much_faster_ours_is() -> None:
    """Seconds are taken for the amount of work that each side does."""
    assert measure_row(row_of(2.0, 6.0), 2) | {"ratio": 3.0, "reached": True} == measure_row(row_of(2.0, 6.0), 2)
    twice = measure_row(row_of(2.0, 6.0, ours=Side(lambda: {"seconds": 2.0}, 50.0), target=1.6), 1)
    assert twice["ratio"] == pytest.approx(150.0) and twice["reached"]
    assert not measure_row(row_of(4.0, 6.0), 1)["reached"]


def test_share_is_what_ours_takes_of_the_plain_side_or_of_a_limit() -> None:
    share = measure_row(row_of(2.0, 8.0, at_most=True, target=0.3), 1)
    assert share["ratio"] == 0.25 and share["reached"] and "<=0.30" in table_line(share)
    limit = measure_row(row_of(12.0, 0.0, plain=10.0, at_most=True, target=1.0), 1)
    assert limit["ratio"] == 1.2 and not limit["reached"] and limit["all_plain"] == []


def test_lengths_are_numbers_and_small() -> None:
    """No text of the data is in the repository, and every histogram is in order."""
    assert PATH.stat().st_size < 20_000
    for task in lengths()["tasks"]:
        assert task["prompt"] == sorted(task["prompt"]) and task["answer"] == sorted(task["answer"])
        assert all(isinstance(value, int) for key in ("prompt", "answer") for value in task[key])
        assert task["prompt"][0] > task["instruction"] and task["answer"][0] >= 2
