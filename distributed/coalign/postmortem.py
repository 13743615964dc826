"""Why a process on a Ray cluster ended: its node was lost, memory ran out, its exit code, the last lines of its log.

Used by pool and ranks. Where a process runs is told by the process itself (`here`), while it lives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
from pathlib import Path
from typing import Any

from coalign.cluster import Cluster, import_ray, one_line

ANSWER_SECONDS = 15.0  # that a node may take to read a log
LAST_LINES = 8
LAST_BYTES = 16384


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process of Ray's runs: what is needed to tell what became of it."""

    node: str
    host: str
    process: int
    gpus: str  # CUDA_VISIBLE_DEVICES
    log: str
    oom_kills: int

    def __str__(self) -> str:
        """Return it in words."""
        return f"process {self.process} on {self.host}" + (f", GPU {self.gpus}" if self.gpus else "")


def here() -> Place:
    """Return this process's place; to be called in a process of Ray's."""
    log = ""
    with contextlib.suppress(OSError):
        log = str(Path("/proc/self/fd/2").readlink())
    node = import_ray().get_runtime_context().get_node_id()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return Place(node, platform.node(), os.getpid(), gpus, log, count_oom_kills())


def count_oom_kills() -> int:
    """Return how many processes this machine's kernel has killed for want of memory."""
    with contextlib.suppress(OSError):
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


def read_end(log: str) -> tuple[list[str], int]:
    """Return the last lines of a log, and how many processes this machine's kernel has killed for want of memory."""
    lines: list[str] = []
    with contextlib.suppress(OSError), Path(log).open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    kept = [line.rstrip() for line in lines if line.strip() and not line.startswith(":")]  # Ray's own marks
    return kept[-LAST_LINES:], count_oom_kills()


def explain_death(cluster: Cluster, place: Place | None, error: BaseException) -> tuple[str, list[str]]:
    """Return why a process ended, in words, and the last lines of its log."""
    if place is None:
        return f"it ended before it had started: {reason_of(error)}", []
    if not cluster.is_alive(place.node):
        return f"its node {place.host} was lost", []
    reference = cluster.ask(place.node, read_end, place.log)
    try:
        lines, kills = cluster.ray.get(reference, timeout=ANSWER_SECONDS)
    except cluster.ray.exceptions.RayError:  # Ray takes its time to count a node as lost
        return f"its node {place.host} does not answer", []
    if kills > place.oom_kills:
        return f"out of memory: the kernel of {place.host} killed it, or a process beside it", lines
    return reason_of(error), lines


def reason_of(error: BaseException) -> str:
    """Return what Ray knows of a death, in one line without its identifiers and advice."""
    text = one_line(error)
    if "running low on memory" in text:
        return f"out of memory: Ray's memory monitor killed it ({text[:300]})"
    if code := re.search(r"exit code[ :=]+(-?\d+)|exit_code=(-?\d+)", text):
        return f"exit code {code[1] or code[2]}"
    if "connection error code" in text:  # all that Ray sees of os._exit, a signal and the kernel's OOM killer alike
        return "it was killed or crashed; Ray does not see its exit code"
    detail = re.search(r"Worker exit detail: (.*?)(?: There are some| Some common causes| The worker|$)", text)
    return (detail[1] if detail else re.sub(r"(class_name|actor_id|namespace|name): \S+ ?", "", text))[:300]


def exit_words(code: int) -> str:
    """Return an exit code in words, as subprocess counts: negative for a signal."""
    import signal

    if code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name}" + (", which out of memory often means" if code == -9 else "")


def say_death(logger: Any, who: str, why: str, lines: list[str], then: str) -> None:
    """Log a death with the last lines that the process has written."""
    logger.warning("%s ended: %s; %s", who, why, then)
    for line in lines:
        logger.warning("    | %s", line)
