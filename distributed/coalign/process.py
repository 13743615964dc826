"""This process: rank and world size, nodes and start time from the environment, seeds, a free port, preemption.

Imports neither torch nor an engine; recipe.py has how a recipe starts and ends.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import socket
import threading

from coalign.errors import UserError

NODES = "COALIGN_NODES"  # names of the job's nodes, in the order of the ranks; slurm/job.sh sets both
START_SECONDS = "COALIGN_START_SECONDS"  # seconds that they may take to start
DEFAULT_START_SECONDS = 300.0
MAX_SECONDS = 1e8


def rank() -> int:
    """Return this process's rank (0 outside a launcher). Raises UserError when RANK is no whole number."""
    return _whole_number("RANK", 0)


def world_size() -> int:
    """Return the number of ranks (1 outside a launcher). Raises UserError when WORLD_SIZE is no whole number."""
    return _whole_number("WORLD_SIZE", 1, least=1)


def local_rank() -> int:
    """Return this process's rank on its node. Raises UserError when LOCAL_RANK is no whole number."""
    return _whole_number("LOCAL_RANK", 0)


def check_launcher() -> None:
    """Raise UserError unless the variables by which a launcher tells a rank its place make sense."""
    here, ranks = rank(), world_size()
    local_rank()
    if here >= ranks:
        raise UserError(f"RANK={here} with WORLD_SIZE={ranks}: a rank is below the number of ranks; see the launcher")


def master_address() -> tuple[str, int]:
    """Return the host and port at which rank 0 waits for the others. Raises UserError for a missing or wrong one."""
    port = _whole_number("MASTER_PORT", 0, least=1, most=65535)
    host = os.environ.get("MASTER_ADDR", "")
    if not host or not port:
        raise UserError(
            f"WORLD_SIZE={world_size()} without MASTER_ADDR and MASTER_PORT in the environment; start several ranks by"
            " a launcher such as deepspeed"
        )
    return host, port


def ranks_here() -> int:
    """Return the number of ranks on this node, as far as the launcher says so. Raises UserError for no number."""
    name = "LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    return _whole_number(name, local_rank() + 1, least=1) if os.environ.get(name) else local_rank() + 1


def _whole_number(name: str, default: int, least: int = 0, most: int = 10**9) -> int:
    """Return what an environment variable says, `default` without it."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"\s*[0-9]{1,10}\s*", text) or not least <= int(text) <= most:
        raise UserError(f"{name}={text!r} in the environment is no number from {least} to {most}; unset it, or mend it")
    return int(text)


def seconds_of(name: str, default: float) -> float:
    """Return the seconds that an environment variable gives, `default` when it is empty. Raises UserError."""
    text = os.environ.get(name)
    if not text:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_SECONDS:
        raise UserError(f"{name}={text!r} in the environment is no number of seconds; unset it, or give one such as 60")
    return seconds


def node_names() -> list[str]:
    """Return the names of the Slurm job's nodes, in the order of the ranks; [] outside a job of slurm/."""
    return os.environ.get(NODES, "").split()


def start_seconds() -> float:
    """Return for how many seconds to wait for nodes and ranks."""
    return seconds_of(START_SECONDS, DEFAULT_START_SECONDS)


def derive_seed(*parts: str | int) -> int:
    """Return a 63-bit seed that depends on nothing but `parts` (BLAKE2b of their JSON)."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def free_port() -> int:
    """Return a TCP port that is free at every address of this node now; another process may still take it first."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class Preemption:
    """A flag that SIGUSR1 or SIGTERM sets; long loops check it between two units of work."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def install(self) -> None:
        """Catch the signals in the main thread."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda *_: self._event.set())

    def remove(self) -> None:
        """Let the signals end this process again."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    def requested(self) -> bool:
        """Return whether this process has been asked to stop."""
        return self._event.is_set()
