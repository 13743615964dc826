"""Other processes that do a row's work: run one and read what it says, or watch what memory it needs."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05


def run_json(command: list[str], environment: dict[str, str] | None = None, timeout: float = 3600.0) -> dict[str, Any]:
    """Run a command, of any environment, and return the JSON object that is the last line of its output."""
    known = os.environ | (environment or {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=known, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[:3]} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run_watched(command: list[str]) -> dict[str, Any]:
    """Run a command and return its wall seconds and the peak memory of its processes, in MiB, added up.

    A peak is read while the process runs: what the kernel reports of an ended one counts its parent's memory too.
    """
    start = time.monotonic()
    peaks: dict[int, float] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None:
            for member in (process.pid, *children_of(process.pid)):
                peaks[member] = max(peaks.get(member, 0.0), peak_mebibytes_of(member))
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - start
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise RuntimeError(f"{command[:3]} failed:\n{output[-4000:]}")
    return {"seconds": seconds, "peak_mib": sum(peaks.values())}


def children_of(process: int) -> list[int]:
    """Return the processes below one."""
    found = []
    try:
        for task in Path(f"/proc/{process}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return found + [below for child in found for below in children_of(child)]


def peak_mebibytes_of(process: int | str = "self") -> float:
    """Return the most memory that a process has had resident since it began its program (0 when it is gone)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)
