"""Why a process on a Ray cluster ended: its node was lost, memory ran out, its exit status, the last lines of its log.

Each process reports where it runs (`here`) while it lives. Knows neither shards nor training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from coalign.clusters import exit_watcher
from coalign.clusters.private_ray import import_ray
from coalign.clusters.ray_connection import Cluster, one_line

LOG_SECONDS = 15.0  # a node may take this long to read a log
EXIT_SECONDS = 2.0  # for an exit status to be written to its file
# Entries of a Ray runtime environment with a Python of their own.
BRINGS_PYTHON = ("py_executable", "uv", "pip", "conda", "container", "image_uri")
LAST_LINES = 8
LAST_BYTES = 16384


@dataclasses.dataclass(frozen=True)
class ProcessPlace:
    """Where a process of Ray's runs, and what is needed to find out later why it ended."""

    node: str
    host: str
    process: int
    gpus: str  # CUDA_VISIBLE_DEVICES
    log: str
    exit_file: str
    oom_kills: int  # `count_oom_kills` of its node when it started

    def __str__(self) -> str:
        """Return the place in words."""
        return f"process {self.process} on {self.host}" + (f", GPU {self.gpus}" if self.gpus else "")


def here() -> ProcessPlace:
    """Return the place of this process, which must be one of Ray's."""
    log = ""
    with contextlib.suppress(OSError):
        log = str(Path("/proc/self/fd/2").readlink())
    node = import_ray().get_runtime_context().get_node_id()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return ProcessPlace(
        node, platform.node(), os.getpid(), gpus, log, os.environ.get(exit_watcher.EXIT_FILE, ""), count_oom_kills()
    )


def watched(ray: Any) -> dict[str, Any]:
    """Return the options with which Ray starts an actor's process under the exit watcher.

    {} where the job brings a Python of its own, which the watcher would replace: its exit status stays unknown.
    """
    if any(ray.get_runtime_context().runtime_env.get(name) for name in BRINGS_PYTHON):
        return {}
    # Ray passes this to a shell. Any Python will do, since the watcher starts the one that Ray itself would take.
    python = f'"$(command -v {shlex.quote(sys.executable)} || command -v python3)"'
    code = shlex.quote(Path(exit_watcher.__file__).read_text(encoding="utf-8"))
    return {"runtime_env": {"py_executable": f"{python} -I -S -c {code}"}}


def count_oom_kills() -> int:
    """Return how many processes this machine's kernel has killed because memory ran out."""
    with contextlib.suppress(OSError):
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


def read_end(log: str, exit_file: str) -> tuple[list[str], int | None, int]:
    """Return what a process left: the last lines of its log, its exit status (None: unknown), `count_oom_kills` now."""
    lines: list[str] = []
    with contextlib.suppress(OSError), Path(log).open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    kept = [line.rstrip() for line in lines if line.strip() and not line.startswith(":")]  # Ray's own marks
    return kept[-LAST_LINES:], _read_status(exit_file), count_oom_kills()


def _read_status(exit_file: str) -> int | None:
    """Return an exit status as subprocess counts it (negative for a signal), once it has been written."""
    deadline = time.monotonic() + EXIT_SECONDS
    with contextlib.suppress(OSError, ValueError):
        while not (text := Path(exit_file).read_text(encoding="utf-8")) and time.monotonic() < deadline:
            time.sleep(0.02)
        return int(text)
    return None


def explain_death(cluster: Cluster, place: ProcessPlace | None, error: BaseException) -> tuple[str, list[str]]:
    """Return why a process ended, in words, and the last lines of its log."""
    if place is None:
        return f"it ended while it started: {reason_of(error)}", []
    if not cluster.is_alive(place.node):
        return f"its node {place.host} was lost", []
    reference = cluster.ask(place.node, read_end, place.log, place.exit_file)
    try:
        lines, code, kills = cluster.ray.get(reference, timeout=LOG_SECONDS)
    except cluster.ray.exceptions.RayError:  # Ray takes a while to declare a node lost
        return f"its node {place.host} does not answer", []
    words = "" if code is None else exit_words(code)
    if kills > place.oom_kills:
        found = f" ({words})" if words else ""
        return f"out of memory: the kernel of {place.host} killed it, or another process there{found}", lines
    return reason_of(error, words), lines


def reason_of(error: BaseException, exit_status: str = "") -> str:
    """Return what Ray knows of a death, on one line without Ray's identifiers and advice.

    `exit_status`, in words, takes precedence over what Ray makes of it.
    """
    text = one_line(error)
    if "running low on memory" in text:
        return f"out of memory: Ray's memory monitor killed it ({text[:300]})"
    if exit_status:
        return exit_status
    if code := re.search(r"exit code[ :=]+(-?\d+)|exit_code=(-?\d+)", text):
        return f"exit status {code[1] or code[2]}"
    if "connection error code" in text:  # all that Ray sees of os._exit, a signal and the kernel's OOM killer alike
        return "it was killed or crashed; Ray does not see its exit status"
    detail = re.search(r"Worker exit detail: (.*?)(?: There are some| Some common causes| The worker|$)", text)
    return (detail[1] if detail else re.sub(r"(class_name|actor_id|namespace|name): \S+ ?", "", text))[:300]


def exit_words(code: int) -> str:
    """Return an exit status in words; as in subprocess, a negative one means a signal."""
    if code >= 0:
        return f"exit status {code}"
    often = ", which often means out of memory" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name} (exit status {code}){often}"


def say_death(logger: Any, who: str, why: str, lines: list[str], then: str) -> None:
    """Log who ended and why, the last lines that the process wrote, and what happens `then`."""
    logger.warning("%s ended: %s; %s", who, why, then)
    for line in lines:
        logger.warning("    | %s", line)
