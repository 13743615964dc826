"""The ranks of a training job meet: missing ranks are named, and the links are tested before the model loads.

Where COALIGN_NODES names the job's nodes, missing ranks are named by their node. Knows torch's process groups, no
DeepSpeed.
"""

from __future__ import annotations

import datetime
import logging
import os
import platform
import statistics
import time

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    PrefixStore,
    TCPStore,
)  # torch.distributed has both, but mypy does not see them there

from coalign.errors import UserError
from coalign.process import node_names, rank, start_seconds, world_size

logger = logging.getLogger("coalign")

PROBE_NUMBERS = 1 << 18  # floats of a probe: 1 MiB
PROBE_SECONDS = 60.0
SLOW_FACTOR, SLOW_SECONDS = 5.0, 0.5  # a link is slow above this multiple of the median and this time
OPEN = "open"  # rank 0 sets it once all ranks are present


def meet(backend: str, device: torch.device, timeout: datetime.timedelta) -> None:
    """Make the process group of all ranks and test its links; `timeout` is that of the group's collectives.

    Raises UserError naming the hosts of ranks that are missing after `process.start_seconds`, or whose links fail.
    """
    store = _open_store()
    hosts = _gather(store)
    dist.init_process_group(
        backend, store=PrefixStore("group", store), rank=rank(), world_size=world_size(), timeout=timeout
    )
    _try_links(hosts, device)


def _open_store() -> TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = datetime.timedelta(seconds=start_seconds())
    try:
        return TCPStore(address, port, world_size(), rank() == 0, patience, wait_for_workers=False)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"rank {rank()} on {platform.node()} can't meet the others at {address}:{port} within"
            f" {start_seconds():.0f} s: {reason}"
        ) from error


def _gather(store: TCPStore) -> list[str]:
    """Wait for all ranks and return the host of each."""
    store.set(f"host {rank()}", platform.node())
    if rank() == 0:
        missing = set(range(world_size()))
        deadline = time.monotonic() + start_seconds()
        while missing := {other for other in missing if not store.check([f"host {other}"])}:
            if time.monotonic() > deadline:
                names = ", ".join(dict.fromkeys(_host_of(other) for other in sorted(missing)))
                message = f"{len(missing)} of {world_size()} ranks did not come within {start_seconds():.0f} s: {names}"
                store.set("outcome", message)
                raise UserError(message)
            time.sleep(0.05)
        store.set("outcome", OPEN)
    else:
        try:
            store.wait(["outcome"], datetime.timedelta(seconds=start_seconds() + PROBE_SECONDS))
        except RuntimeError as error:
            raise UserError(f"rank 0 at {os.environ['MASTER_ADDR']} has gone while the ranks met") from error
        if store.get("outcome").decode() != OPEN:
            raise SystemExit(2)  # rank 0 says why
    return [store.get(f"host {other}").decode() for other in range(world_size())]


def _host_of(other: int) -> str:
    """Return a missing rank's name with its node: ranks fill one node after another."""
    names, ranks = node_names(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    node = other // ranks
    return f"rank {other} of node {names[node]}" if node < len(names) else f"rank {other}"


def _try_links(hosts: list[str], device: torch.device) -> None:
    """All-reduce over all ranks, then broadcast from each host; name hosts that do not answer or are slow."""
    numbers = torch.ones(PROBE_NUMBERS, device=device)
    try:
        _within(dist.all_reduce(numbers, async_op=True), device)
    except RuntimeError as error:
        raise UserError(
            f"rank {rank()} on {platform.node()}: an all-reduce over {world_size()} ranks on {_named(hosts)} was not"
            f" done within {PROBE_SECONDS:.0f} s: {str(error).partition(chr(10))[0]}"
        ) from error
    if float(numbers.mean()) != world_size():
        raise UserError(f"an all-reduce over {world_size()} ranks on {_named(hosts)} gave {float(numbers.mean()):g}")
    firsts = {host: hosts.index(host) for host in hosts}
    if len(firsts) < 2:
        return
    seconds = torch.zeros(len(firsts), device=device)
    for place, first in enumerate(firsts.values()):
        started = time.monotonic()
        _within(dist.broadcast(numbers, first, async_op=True), device)
        seconds[place] = time.monotonic() - started
    dist.all_reduce(seconds, dist.ReduceOp.MAX)  # a sender finishes before the receivers do
    taken = dict(zip(firsts, seconds.tolist(), strict=True))
    logger.info("%d ranks on %s; 1 MiB to all takes %.0f ms", world_size(), _named(hosts), 1e3 * max(taken.values()))
    if slow := slow_hosts(taken):
        logger.warning(
            "warning: sending from %s takes %.1f s per MiB, from the others %.2f s; every update waits for it",
            *(", ".join(slow), max(taken.values()), statistics.median_low(taken.values())),
        )


def slow_hosts(seconds: dict[str, float]) -> list[str]:
    """Return the hosts whose broadcast took much longer than the median; `seconds` are by host."""
    usual = statistics.median_low(seconds.values())
    return [host for host, taken in seconds.items() if taken > max(SLOW_FACTOR * usual, SLOW_SECONDS)]


def _within(work: dist.Work, device: torch.device) -> None:
    """Wait for a collective. Raises RuntimeError after PROBE_SECONDS."""
    if not work.wait(datetime.timedelta(seconds=PROBE_SECONDS)):
        raise RuntimeError("no answer")
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _named(hosts: list[str]) -> str:
    unique = list(dict.fromkeys(hosts))
    return ", ".join(unique[:8]) + (f" and {len(unique) - 8} more" if len(unique) > 8 else "")
