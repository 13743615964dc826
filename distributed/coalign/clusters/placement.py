"""A demand on a Ray cluster against what its nodes have: whether it can ever fit, what fits now, the table of both.

`asked_workers` and `asked_ranks` decide how many CPUs and GPUs each worker and rank asks for. Knows no Ray.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

from coalign.config import GenerationTable
from coalign.errors import UserError

logger = logging.getLogger("coalign")

ROUNDING = 1e-6  # Ray counts in ten-thousandths
SAY_SECONDS = 20.0  # between two log lines about a demand that waits


@dataclasses.dataclass(frozen=True)
class Node:
    """A living node: its CPUs and GPUs in all, and those that are free now."""

    id: str
    name: str
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float


@dataclasses.dataclass(frozen=True)
class Demand:
    """A number of processes, each with its CPUs and GPUs on one node.

    `what` is what they are called, `setting` the key and value that ask for them.
    """

    what: str
    setting: str
    count: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        """Return the demand in words."""
        each = f"{self.gpus:g} GPU and " if self.gpus else ""
        return f"{self.count} {self.what}, each with {each}{self.cpus:g} CPU on one node"


def room_on(node: Node, asked: Demand, free: bool) -> int:
    """Return how many of the processes fit on a node: in what is `free` now, or in all that it has."""
    cpus, gpus = (node.free_cpus, node.free_gpus) if free else (node.cpus, node.gpus)
    by_cpu = math.floor(cpus / asked.cpus + ROUNDING) if asked.cpus else asked.count
    if not asked.gpus:
        return by_cpu
    if asked.gpus >= 1:
        return min(by_cpu, math.floor(gpus / asked.gpus + ROUNDING))
    whole = math.floor(gpus + ROUNDING)  # a share of a GPU never spans two
    parts = whole * math.floor(1 / asked.gpus + ROUNDING) + math.floor((gpus - whole) / asked.gpus + ROUNDING)
    return min(by_cpu, parts)


def fill(nodes: Sequence[Node], asked: Demand, free: bool) -> dict[str, int]:
    """Return {node id: processes} on as few nodes as possible, roomiest first. Where not all fit, fewer are placed."""
    left, placed = asked.count, {}
    for node in sorted(nodes, key=lambda node: (-room_on(node, asked, free), node.name)):
        if count := min(left, room_on(node, asked, free)):
            placed[node.id] = count
            left -= count
    return placed


def demand_lines(nodes: Sequence[Node], asked: Demand) -> list[str]:
    """Return what is asked and a table of what is free, one line per node."""
    rows = [("node", "GPU free of all", "CPU free of all", "room now", "room in all")]
    for node in sorted(nodes, key=lambda node: node.name):
        gpus, cpus = f"{node.free_gpus:g} of {node.gpus:g}", f"{node.free_cpus:g} of {node.cpus:g}"
        rows.append((node.name, gpus, cpus, str(room_on(node, asked, True)), str(room_on(node, asked, False))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f"asked: {asked} ({asked.setting})", *lines]


def complaint_of_demand(nodes: Sequence[Node], asked: Demand) -> str:
    """Return why these nodes can never meet a demand, and a way out; "" when they can."""
    room = sum(room_on(node, asked, False) for node in nodes)
    if room >= asked.count:
        return ""
    by_gpus = sum(room_on(node, dataclasses.replace(asked, cpus=0), False) for node in nodes)
    by_cpus = sum(room_on(node, dataclasses.replace(asked, gpus=0), False) for node in nodes)
    if asked.gpus and by_gpus <= by_cpus:
        short, each, have = "GPUs", asked.gpus, [node.gpus for node in nodes]
    else:
        short, each, have = "CPUs", asked.cpus, [node.cpus for node in nodes]
    need = f"{each * asked.count:g} {short}"
    if each * asked.count <= sum(have):  # enough of them, but not where they are needed
        need = f"{asked.count} x {each:g} {short}, each on one node"
        need += " beside the GPUs" if asked.gpus and short == "CPUs" else ""
    where = f" on {len(nodes)} nodes with at most {max(have):g}" if len(nodes) > 1 else ""
    way = f"use {room} {asked.what} or fewer" if room else f"use fewer {short} each"
    return f"{asked.setting} asks for {need}, the cluster has {sum(have):g}{where}; {way}, or start more nodes"


def log_demand(nodes: Sequence[Node], asked: Demand) -> None:
    """Log the table of `demand_lines` as warnings, before the error that it explains."""
    for line in demand_lines(nodes, asked):
        logger.warning("%s", line)


def require_fits(nodes: Sequence[Node], asked: Demand, grows: bool) -> None:
    """Raise UserError, after the table, when these nodes can never meet a demand. A cluster that `grows` always may."""
    if not grows and (problem := complaint_of_demand(nodes, asked)):
        log_demand(nodes, asked)
        raise UserError(problem)


def waiting_words(nodes: Sequence[Node], asked: Demand, missing: int) -> str:
    """Return what is waited for and what is free meanwhile, with the names of at most 8 nodes."""
    shown = []
    for node in sorted(nodes, key=lambda node: node.name)[:8]:
        gpus = f"{node.free_gpus:g} of {node.gpus:g} GPU, " if asked.gpus else ""
        shown.append(f"{node.name} {gpus}{node.free_cpus:g} of {node.cpus:g} CPU")
    more = f" and {len(nodes) - 8} more nodes" if len(nodes) > 8 else ""
    each = f"{asked.gpus:g} GPU and " if asked.gpus else ""
    return f"waiting for {missing} of {asked.count} {asked.what} ({each}{asked.cpus:g} CPU each); free: " + (
        "; ".join(shown) + more
    )


def asked_workers(nodes: Sequence[Node], settings: GenerationTable) -> Demand:
    """Return what [generation] asks for. gpus_per_worker < 0 means one GPU per worker, or equal shares.

    Raises UserError where vLLM would have to share a GPU without knowing its share.
    """
    workers, gpus = settings.workers, settings.gpus_per_worker
    setting = f"generation.workers={workers}"
    if gpus < 0:
        have = sum(node.gpus for node in nodes)
        gpus = share_of_gpus(nodes, workers)
        if settings.engine == "vllm" and 0 < gpus < 1:  # vLLM takes its share of the memory at once
            raise UserError(
                f'generation.workers={workers} would share {have:g} GPU; with generation.engine="vllm" use'
                f" generation.workers={math.floor(have)}, or set generation.gpus_per_worker={gpus:g}"
            )
    else:
        setting += f" x gpus_per_worker={gpus:g}"
    return Demand("workers", setting, workers, 1.0, gpus)


def share_of_gpus(nodes: Sequence[Node], workers: int) -> float:
    """Return the GPUs per worker where the user sets none: one, or a share of one where there are too few."""
    whole = sum(math.floor(node.gpus) for node in nodes)
    if whole < 1:
        return 0.0
    return 1.0 if whole >= workers else math.floor(100 / math.ceil(workers / whole)) / 100


def asked_ranks(nodes: Sequence[Node], ranks: int, cpus_per_rank: int) -> Demand:
    """Return what training asks for: one GPU per rank, or CPUs alone on a cluster without GPUs.

    With `ranks` = 0 every GPU gets a rank, or every node where there are no GPUs.
    """
    gpus = sum(math.floor(node.gpus) for node in nodes)
    count = ranks or gpus or len(nodes)
    return Demand("ranks", f"train.ray_ranks={ranks or f'0, here {count}'}", count, cpus_per_rank, 1.0 if gpus else 0.0)


def spread(nodes: Sequence[Node], asked: Demand, automatic: bool, free: bool) -> dict[str, int]:
    """Return {node id: ranks}, {} where they don't all fit; `automatic`: one per node without GPUs."""
    if automatic and not asked.gpus:
        placed = {node.id: 1 for node in nodes if room_on(node, asked, free)}
    else:
        placed = fill(nodes, asked, free)
    return placed if sum(placed.values()) == asked.count else {}
