"""What fits a cluster, what never will, and what the user is told."""

from __future__ import annotations

import dataclasses

import pytest

from coalign.clusters.placement import (
    Demand,
    Node,
    asked_ranks,
    asked_workers,
    complaint_of_demand,
    demand_lines,
    fill,
    room_on,
    spread,
)
from coalign.clusters.placement import waiting_words as waiting
from coalign.config import GenerationTable

ALPHA = Node("a", "alpha", cpus=8, gpus=4, free_cpus=8, free_gpus=1)
BETA = Node("b", "beta", cpus=8, gpus=2, free_cpus=8, free_gpus=2)
PLAIN = Node("c", "plain", cpus=4, gpus=0, free_cpus=1, free_gpus=0)


def asked(count: int, gpus: float, cpus: float = 1.0) -> Demand:
    return Demand("workers", f"generation.workers={count}", count, cpus, gpus)


@pytest.mark.parametrize(
    ("gpus", "cpus", "in_all", "now"),
    [
        (1, 1, 4, 1),
        (2, 1, 2, 0),
        (3, 1, 1, 0),
        (5, 1, 0, 0),
        (0.5, 1, 8, 2),
        (0.4, 1, 8, 2),  # two a GPU: 0.2 of each is of no use to a third
        (0, 1, 8, 8),
        (1, 3, 2, 1),
    ],
)
def test_room_on_a_node(gpus: float, cpus: float, in_all: int, now: int) -> None:
    request = asked(99, gpus, cpus)
    assert (room_on(ALPHA, request, False), room_on(ALPHA, request, True)) == (in_all, now)


def test_as_few_nodes_as_possible() -> None:
    assert fill([BETA, ALPHA, PLAIN], asked(4, 1), False) == {"a": 4}
    assert fill([BETA, ALPHA, PLAIN], asked(5, 1), False) == {"a": 4, "b": 1}
    assert fill([BETA, ALPHA, PLAIN], asked(5, 1), True) == {"b": 2, "a": 1}


def test_a_request_that_never_fits_says_what_there_is_and_what_to_do() -> None:
    """GPUs on different nodes don't add up for one worker, which the numbers in all would hide."""
    assert complaint_of_demand([ALPHA, BETA], asked(3, 2)) == ""
    assert complaint_of_demand([ALPHA, BETA], asked(2, 3)) == (
        "generation.workers=2 asks for 2 x 3 GPUs, each on one node, the cluster has 6 on 2 nodes with at most 4; use 1"
        " workers or fewer, or start more nodes"
    )
    assert "asks for 9 GPUs, the cluster has 4; use fewer GPUs each" in complaint_of_demand([ALPHA], asked(1, 9))
    assert "asks for 5 CPUs, the cluster has 4; use 4 workers or fewer" in complaint_of_demand([PLAIN], asked(5, 0))


def test_what_is_short_is_named() -> None:
    """CPUs that are enough in all and too few on each node, with and without GPUs beside them."""
    nodes = [Node(name, name, cpus=3, gpus=gpus, free_cpus=3, free_gpus=gpus) for name, gpus in (("a", 4), ("b", 4))]
    plain = [dataclasses.replace(node, gpus=0) for node in nodes]
    assert "asks for 3 x 2 CPUs, each on one node, the cluster has 6 on 2 nodes with at most 3; use 2 workers" in (
        complaint_of_demand(plain, asked(3, 0, cpus=2))
    )
    assert "asks for 3 x 2 CPUs, each on one node beside the GPUs, the cluster has 6" in complaint_of_demand(
        nodes, asked(3, 1, cpus=2)
    )
    assert "asks for 9 GPUs, the cluster has 8" in complaint_of_demand(nodes, asked(9, 1, cpus=0.1))


def test_the_table_shows_asked_and_free() -> None:
    lines = demand_lines([BETA, ALPHA], asked(2, 2))
    assert lines[0] == "asked: 2 workers, each with 2 GPU and 1 CPU on one node (generation.workers=2)"
    assert [line.split()[0] for line in lines[1:]] == ["node", "alpha", "beta"]
    assert "1 of 4" in lines[2] and lines[2].split()[-2:] == ["0", "2"]
    assert "2 of 2" in lines[3] and lines[3].split()[-2:] == ["1", "1"]


def test_waiting_says_for_what() -> None:
    assert waiting([ALPHA, BETA], asked(3, 2), 2) == (
        "waiting for 2 of 3 workers (2 GPU and 1 CPU each); free: alpha 1 of 4 GPU, 8 of 8 CPU; beta 2 of 2 GPU, 8 of 8"
        " CPU"
    )
    many = [Node(str(i), f"n{i}", 1, 0, 1, 0) for i in range(11)]
    assert waiting(many, asked(20, 0), 20).endswith("and 3 more nodes")


@pytest.mark.parametrize(("workers", "gpus"), [(6, 1.0), (7, 0.5), (13, 0.33), (1, 1.0)])
def test_workers_share_gpus_where_there_are_too_few(workers: int, gpus: float) -> None:
    """A share that all workers fit in: parts of one GPU, never across two."""
    request = asked_workers([ALPHA, BETA], GenerationTable(workers=workers))
    assert request.gpus == gpus
    assert sum(room_on(node, request, False) for node in (ALPHA, BETA)) >= workers


def test_ranks_fill_gpus_or_stand_one_a_node() -> None:
    nodes = [ALPHA, BETA, PLAIN]
    automatic = asked_ranks(nodes, 0, 1)
    assert (automatic.count, automatic.gpus) == (6, 1.0)
    assert spread(nodes, automatic, True, False) == {"a": 4, "b": 2}
    assert spread(nodes, automatic, True, True) == {}  # three GPUs are taken: all or none
    bare = [PLAIN, Node("d", "other", 4, 0, 4, 0)]
    assert spread(bare, asked_ranks(bare, 0, 1), True, True) == {"c": 1, "d": 1}
    assert spread(bare, asked_ranks(bare, 3, 1), False, True) == {"d": 3}
