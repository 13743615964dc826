"""A node of a Slurm job before the work: the other nodes, addresses, ports, GPUs, disk, progress since the last start.

Knows no engine and imports none, so it answers at once.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from coalign.errors import UserError
from coalign.process import node_names, start_seconds
from coalign.runs.atomic_files import require_free_space, write_json

MAX_REQUEUES = 3  # without progress; then the job fails
FIRST_PORT, NUM_PORTS = 20000, 12000  # below the range that the system gives to outgoing connections
PORTS_PER_JOB = 16
STARTS_FILE = ".starts.json"  # in a step's folder: how far it was at each start of a job
GIB = 2**30


def wait_for(names: Sequence[str], present: Callable[[], set[str]], what: str) -> None:
    """Return when `present` holds all names. Raises UserError with the missing ones after slurm.start_seconds."""
    deadline = time.monotonic() + start_seconds()
    while missing := [name for name in names if name not in present()]:
        if time.monotonic() > deadline:
            raise UserError(
                f"{what}: {', '.join(missing)} did not come within {start_seconds():.0f} s (slurm.start_seconds)"
            )
        time.sleep(0.2)


def job_port(job: int, index: int = 0) -> int:
    """Return a free port of this host: the one of this job and index, or the next that is free.

    Raises UserError when no port is free.
    """
    first = job * PORTS_PER_JOB + index
    for number in range(NUM_PORTS):
        port = FIRST_PORT + (first + number) % NUM_PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError(f"no port from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS} is free on {socket.gethostname()}")


def own_address(names: Sequence[str]) -> str:
    """Return the IP address at which the job's other nodes reach this one; 127.0.0.1 when it is alone.

    This host's own name often resolves to 127.0.1.1. The route to another node has the right address. Raises UserError
    when that node's name can't be resolved.
    """
    here = socket.gethostname().partition(".")[0]
    others = [name for name in names if name.partition(".")[0] != here]
    if not others:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((others[0], 9))  # sends nothing
        except OSError as error:
            raise UserError(f"{here} can't look up the node {others[0]}: {error}") from error
        return str(probe.getsockname()[0])


def count_gpus() -> int:
    """Return how many GPUs this task may use: those that Slurm assigned and, where it is installed, nvidia-smi sees."""
    assigned = len([name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()])
    if not assigned or shutil.which("nvidia-smi") is None:
        return assigned
    shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return min(assigned, sum(line.startswith("GPU") for line in shown.splitlines()))


def check_gpus(host: str, found: int, expected: int, what: str) -> None:
    """Raise UserError when a node has fewer GPUs than `what` needs."""
    if found < expected:
        raise UserError(
            f"{host} has {found} GPUs for this job, {what} needs {expected}; set slurm.gpus_per_node (and"
            " slurm.ranks_per_node, generation.workers) to what the nodes have"
        )


def check_disk(host: str, folder: Path, free_gib: int) -> None:
    """Raise UserError unless `free_gib` GiB are free for a folder, and 1 GiB for this node's temporary files."""
    try:
        require_free_space(folder, free_gib * GIB, "a job (slurm.free_gib)")
        require_free_space(Path(os.environ.get("TMPDIR") or "/tmp"), min(free_gib, 1) * GIB, "a job")
    except UserError as error:
        raise UserError(f"on {host}: {error}") from None


def check_shared(host: str, folder: Path, attempt: str, is_first: bool) -> None:
    """Let the first node put a mark into the run's folder. Raises UserError on a node that doesn't see it in time."""
    mark = folder / f".seen-{attempt}"
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
        return
    deadline = time.monotonic() + min(60.0, start_seconds() / 2)  # a network file system may show it late
    while not mark.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"the run's folder {folder.resolve()} is not the same on {host} as on {node_names()[0]}; set run.folder"
                " to a disk that every node sees"
            )
        list(folder.glob("*"))  # makes NFS refresh the folder
        time.sleep(0.2)


def progress_of(step: Path) -> list[int]:
    """Return how far a step is: its newest checkpoint's update, its number of shards, its number of files.

    The last grows when training is done and the model is exported, or when outputs are written.
    """
    checkpoints = [int(path.name.partition("_")[2]) for path in (step / "checkpoints").glob("step_*")]
    shards = len(list((step / "shards").glob("*.jsonl")))
    files = len([path for path in step.glob("*") if not path.name.startswith(".")])
    return [max(checkpoints, default=0), shards, files]


def count_start(step: Path, job: int, restarts: int) -> None:
    """Record a start of a job. Raises UserError when it was requeued MAX_REQUEUES times without progress.

    A job that is submitted anew counts from the beginning.
    """
    path = step / STARTS_FILE
    starts: list[list[int]] = []
    if restarts and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        starts = before["starts"] if before["job"] == job else []
    starts.append(progress_of(step))
    step.mkdir(parents=True, exist_ok=True)
    write_json(path, {"job": job, "starts": starts})
    recent = starts[-1 - MAX_REQUEUES :]
    if len(recent) > MAX_REQUEUES and recent[0][:2] == recent[-1][:2] and recent[0][2] >= recent[-1][2]:
        update, shards, _ = starts[-1]
        raise UserError(
            f"job {job} was requeued {MAX_REQUEUES} times without progress: {step} still has"
            f" {f'its checkpoint after update {update}' if update else 'no checkpoint'} and {shards} shards. Look for"
            " the cause further up in this log; if the time was too short, raise slurm.time or lower"
            " train.checkpoint_every or generation.shard_size, then submit again"
        )
