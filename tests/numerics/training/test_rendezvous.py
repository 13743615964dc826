"""Ranks meet: missing ones are named, and so are slow links."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

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


LISTENERS = """
import datetime, os, sys
from pathlib import Path
import torch
from coalign.training.rendezvous import meet
meet("gloo", torch.device("cpu"), datetime.timedelta(seconds=60))
total = torch.ones(1)
torch.distributed.all_reduce(total)
links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]
own = {link[8:-1] for link in links if link.startswith("socket:[")}
for table in ("tcp", "tcp6"):
    for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and words[9] in own:
            print(words[1].partition(":")[0])
torch.distributed.barrier()
"""
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1 and ::1, as the kernel writes them


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.deepspeed)])
def test_ranks_of_one_machine_listen_to_it_alone(world: int) -> None:
    """No port of a training on a laptop is open to the network: neither the store's nor the backend's."""
    places = (
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job_port(4)), "WORLD_SIZE": str(world)} if world > 1 else {}
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LISTENERS],
            env=os.environ | places | ({"RANK": str(number)} if world > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(world)
    ]
    heard = [process.communicate(timeout=120)[0].split() for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world
    assert Path("/proc/self/net/tcp").exists()
    assert {address for addresses in heard for address in addresses} <= LOOPBACK


@pytest.mark.parametrize("host", ["nosuch.invalid", "x" * 300, "a..b"])
def test_a_first_node_of_no_host_is_named_at_once(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(1, 2, job_port(5), monkeypatch, "0.3")
    monkeypatch.setenv("MASTER_ADDR", host)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"MASTER_ADDR='.*knows no such host"):
        meet("gloo", torch.device("cpu"), datetime.timedelta(seconds=5))
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("port", ["abc", "", "0", "70000"])
def test_a_port_that_is_none(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(1, 2, job_port(5), monkeypatch)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match=r"MASTER_PORT=.* is no number from 1 to 65535"):
        meet("gloo", torch.device("cpu"), datetime.timedelta(seconds=5))
