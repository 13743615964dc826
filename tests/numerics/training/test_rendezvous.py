"""Ranks meet: missing ones are named, and so are slow links."""

from __future__ import annotations

import datetime

import pytest
import torch
from torch import multiprocessing

from coalign.clusters.slurm_node import job_port
from coalign.errors import UserError
from coalign.training.rendezvous import meet, slow_hosts

NODES = "alpha beta gamma"


def as_rank(number: int, world: int, port: int, patch: pytest.MonkeyPatch, seconds: str = "30") -> None:
    values = {"RANK": number, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "COALIGN_NODES": NODES}.items():
        patch.setenv(name, str(value))
    patch.setenv("COALIGN_START_SECONDS", seconds)


def come(number: int, port: int) -> None:
    """Join as one of two ranks and compute something together."""
    with pytest.MonkeyPatch.context() as patch:
        as_rank(number, 2, port, patch)
        meet("gloo", torch.device("cpu"), datetime.timedelta(seconds=60))
        total = torch.tensor([float(number + 1)])
        torch.distributed.all_reduce(total)
        assert total.item() == 3.0


def test_ranks_that_do_not_come_are_named_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(0, 6, job_port(1), monkeypatch, "0.5")
    with pytest.raises(UserError, match=r"5 of 6 ranks did not come .* rank 1 of node alpha, rank 2 of node beta"):
        meet("gloo", torch.device("cpu"), datetime.timedelta(seconds=5))


def test_a_rank_without_its_first_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    port = job_port(2)
    as_rank(1, 2, port, monkeypatch, "1")
    with pytest.raises(UserError, match=f"can't meet the others at 127.0.0.1:{port} within 1 s"):
        meet("gloo", torch.device("cpu"), datetime.timedelta(seconds=5))


@pytest.mark.deepspeed
def test_ranks_that_come_make_a_group() -> None:
    multiprocessing.spawn(come, (job_port(3),), nprocs=2)


def test_a_slow_host_is_told_from_the_usual() -> None:
    assert slow_hosts({"a": 0.01, "b": 0.02, "c": 3.0}) == ["c"]
    assert slow_hosts({"a": 0.01, "b": 0.2}) == []  # both are quick
    assert slow_hosts({"a": 4.0, "b": 4.1, "c": 3.9}) == []
