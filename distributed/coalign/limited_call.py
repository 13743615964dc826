"""A function called in a forked process with limits on time and memory, for code that comes with a model.

Knows no templates.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

CPU_SECONDS, WALL_SECONDS = 5, 120  # a busy machine may take long for little work
MEMORY_BYTES = 1 << 29  # beyond what this process has
_BLOCK = 1 << 16


class TooMuchError(Exception):
    """The function took more time or memory than it may, or ended its process."""


def call_limited(work: Callable[[], Any], cpu_seconds: int = CPU_SECONDS, memory_bytes: int = MEMORY_BYTES) -> Any:
    """Return what `work` returns, as JSON has it, from a forked process. Raises TooMuchError beyond the limits.

    `work` must catch its own exceptions: one that leaves it ends the process.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python warns of other threads at a fork; the process below takes no lock that a thread could hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _work_and_exit(work, writer, cpu_seconds, memory_bytes)
    os.close(writer)
    try:
        written = _read_all(reader, time.monotonic() + WALL_SECONDS)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it has written its result, or may not go on
        _, status = os.waitpid(pid, 0)
    if written:
        with contextlib.suppress(ValueError):
            return json.loads(written)
    over = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    raise TooMuchError(f"takes more than {cpu_seconds} seconds" if over else "needs too much memory")


def _work_and_exit(work: Callable[[], Any], writer: int, cpu_seconds: int, memory_bytes: int) -> None:
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, size + memory_bytes)
        _lower(resource.RLIMIT_CPU, cpu_seconds)
        _lower(resource.RLIMIT_CORE, 0)
        left = memoryview(json.dumps(work()).encode())
        while left:
            left = left[os.write(writer, left) :]
    finally:
        os._exit(1)  # no cleanup of what belongs to the other process


def _lower(kind: int, value: int) -> None:
    soft, hard = resource.getrlimit(kind)
    known = [limit for limit in (soft, hard, value) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(kind, (min(known), hard))


def _read_all(reader: int, deadline: float) -> bytes:
    found = bytearray()
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        block = os.read(reader, _BLOCK)
        if not block:
            return bytes(found)
        found += block
    return b""
