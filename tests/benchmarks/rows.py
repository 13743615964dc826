"""What a line of the table is, and how its two sides are measured: in turn, on the same work, in one run.

A row against another project is a row like the others: its plain side runs a command in that project's own environment
(`processes.run_json`) and reports its seconds, with `measure=reported("seconds")`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

Work = Callable[[], Any]
Measure = Callable[[Work], tuple[float, Any]]


def cpu_seconds(work: Work) -> tuple[float, Any]:
    """Return the CPU seconds that this process spends, so that a busy machine does not count, and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def reported(key: str) -> Measure:
    """Return how to measure work that runs in other processes and says itself what it took."""

    def measure(work: Work) -> tuple[float, Any]:
        result = work()
        return float(result[key]), result

    return measure


def peak_mebibytes(work: Work) -> tuple[float, Any]:
    """Return the most that tensors made by the work held at one time, above what there was before, and the result."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20, result


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to do the work, and how much of it that is (tokens, where the sides do not do equally much)."""

    work: Work
    amount: float = 1.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    The ratio is how much faster ours is, to be `target` at least; with `at_most` it is what ours takes as a share of
    what the plain side takes. `plain` may be a number: a limit instead of another way. `same(plain result, our result)`
    says whether both sides found the same; of a limit it is asked about our result alone.
    """

    name: str
    against: str
    target: float
    ours: Side
    plain: Side | float
    same: Callable[[Any, Any], bool]
    at_most: bool = False
    unit: str = "CPU s"
    measure: Measure = cpu_seconds
    warm_up: bool = True
    max_repeats: int = 100


Builder = Callable[[bool], list[Row]]


def measure_row(row: Row, repeats: int) -> dict[str, Any]:
    """Return a row's result: the least that either side took, measured in turn, after a round of each to warm up."""
    repeats = min(repeats, row.max_repeats)
    sides = {"ours": row.ours} if isinstance(row.plain, float) else {"plain": row.plain, "ours": row.ours}
    taken: dict[str, list[float]] = {"plain": [], "ours": []}
    results: dict[str, Any] = {}
    if row.warm_up:
        results = {name: side.work() for name, side in sides.items()}
    for _ in range(repeats):
        for name, side in sides.items():
            value, result = row.measure(side.work)
            taken[name].append(value)
            results.setdefault(name, result)
    ours = min(taken["ours"])
    plain = row.plain if isinstance(row.plain, float) else min(taken["plain"])
    amounts = 1.0 if isinstance(row.plain, float) else row.ours.amount / row.plain.amount
    ratio = ours / plain / amounts if row.at_most else plain / ours * amounts
    return {
        "row": row.name,
        "against": row.against,
        "unit": row.unit,
        "plain": round(plain, 3),
        "ours": round(ours, 3),
        "ratio": round(ratio, 3),
        "target": round(row.target, 3),
        "at_most": row.at_most,
        "reached": ratio <= row.target if row.at_most else ratio >= row.target,
        "same_result": bool(row.same(results.get("plain"), results["ours"])),
        "all_plain": [round(value, 3) for value in taken["plain"]],
        "all_ours": [round(value, 3) for value in taken["ours"]],
        "threads": torch.get_num_threads(),
    }


HEADER = (
    f"{'row':<58} {'unit':<6} {'plain':>8} {'ours':>8} {'ratio':>7} {'target':>7} {'reached':<7} {'same':<5} against"
)


def table_line(found: dict[str, Any]) -> str:
    """Return a result as a line under HEADER; <= marks a ratio that should be small."""
    target = ("<=" if found["at_most"] else ">=") + f"{found['target']:.2f}"
    reached, same = ("yes" if found[key] else "no" for key in ("reached", "same_result"))
    numbers = f"{found['plain']:>8.2f} {found['ours']:>8.2f} {found['ratio']:>7.2f} {target:>7}"
    return f"{found['row']:<58} {found['unit']:<6} {numbers} {reached:<7} {same:<5} {found['against']}"
