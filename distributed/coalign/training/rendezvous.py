"""The ranks of a training job meet: missing ranks are named, and the links are tested before the model loads.

Where COALIGN_NODES names the job's nodes, missing ranks are named by their node. Knows torch's process groups, no
DeepSpeed.
"""

from __future__ import annotations

import datetime
import ipaddress
import logging
import os
import platform
import socket
import statistics
import time

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    HashStore,
    PrefixStore,
    TCPStore,
)  # torch.distributed has them, but mypy does not see them there

from coalign.errors import UserError
from coalign.process import master_address, node_names, rank, ranks_here, start_seconds, world_size

logger = logging.getLogger("coalign")

PROBE_NUMBERS = 1 << 18  # floats of a probe: 1 MiB
PROBE_SECONDS = 60.0
SLOW_FACTOR, SLOW_SECONDS = 5.0, 0.5  # a link is slow above this multiple of the median and this time
RESOLVE_SECONDS = 10.0  # a name service may learn of new nodes late
LOOPBACK, LOOPBACK_ADDRESS = "lo", "127.0.0.1"
OPEN = "open"  # rank 0 sets it once all ranks are present


def meet(backend: str, device: torch.device, timeout: datetime.timedelta) -> None:
    """Make the process group of all ranks and test its links; `timeout` is that of the group's collectives.

    Raises UserError naming the hosts of ranks that are missing after `process.start_seconds`, or whose links fail.
    """
    if world_size() == 1:
        _stay_on_this_machine()
        if not dist.is_initialized():
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    store = _open_store()
    hosts = _gather(store)
    dist.init_process_group(
        backend, store=PrefixStore("group", store), rank=rank(), world_size=world_size(), timeout=timeout
    )
    _try_links(hosts, device)


def _stay_on_this_machine() -> None:
    """Keep the backends' ports from other machines: they ask for no password."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, LOOPBACK)


def _open_store() -> TCPStore:
    address, port = master_address()
    patience = datetime.timedelta(seconds=start_seconds())
    is_local = _is_loopback(address)
    if is_local:
        _stay_on_this_machine()
        address = LOOPBACK_ADDRESS
    else:
        _require_host(address)
    try:
        if is_local and rank() == 0:  # torch itself would listen at every address
            with socket.create_server((LOOPBACK_ADDRESS, port)) as server:
                return TCPStore(
                    *(address, port, world_size(), True, patience),
                    wait_for_workers=False,
                    master_listen_fd=server.detach(),
                )
        return TCPStore(address, port, world_size(), rank() == 0, patience, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"rank {rank()} on {platform.node()} can't meet the others at {address}:{port} within"
            f" {start_seconds():.0f} s: {reason}"
        ) from error


def _require_host(host: str) -> None:
    """Raise UserError when a host stays unknown for RESOLVE_SECONDS; torch would only warn, for minutes."""
    deadline = time.monotonic() + min(RESOLVE_SECONDS, start_seconds())
    while True:
        try:
            socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:  # a name that is too long for the name service is a UnicodeError
            if time.monotonic() > deadline:
                reason = error.strerror if isinstance(error, OSError) else error
                raise UserError(
                    f"MASTER_ADDR={host!r}: rank {rank()} on {platform.node()} knows no such host ({reason}); give the"
                    " launcher a name or an address of the first node"
                ) from error
            time.sleep(0.5)


def _is_loopback(host: str) -> bool:
    """Return whether a host is written as this machine; a node's own name may mean so here, and not elsewhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
    names, ranks = node_names(), _ranks_per_node()
    node = other // ranks
    return f"rank {other} of node {names[node]}" if node < len(names) else f"rank {other}"


def _ranks_per_node() -> int:
    return ranks_here() if os.environ.get("LOCAL_WORLD_SIZE") else 1


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
