"""This process: rank and world size, nodes and start time from the environment, seeds, a free port, preemption.

Imports neither torch nor an engine; recipe.py has how a recipe starts and ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import threading

NODES = "COALIGN_NODES"  # names of the job's nodes, in the order of the ranks; slurm/job.sh sets both
START_SECONDS = "COALIGN_START_SECONDS"  # seconds that they may take to start
DEFAULT_START_SECONDS = 300.0


def rank() -> int:
    """Return this process's rank (0 outside a launcher)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of ranks (1 outside a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return this process's rank on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def node_names() -> list[str]:
    """Return the names of the Slurm job's nodes, in the order of the ranks; [] outside a job of slurm/."""
    return os.environ.get(NODES, "").split()


def start_seconds() -> float:
    """Return for how many seconds to wait for nodes and ranks."""
    return float(os.environ.get(START_SECONDS) or DEFAULT_START_SECONDS)


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
