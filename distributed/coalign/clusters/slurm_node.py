"""What a Slurm job finds out about itself before the work: its nodes, a free port, whether everything is in place.

Used by launch/preflight.py on every node, by cluster.py and ray_node.py. Imports no torch, so it answers at once.
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

MAX_REQUEUES = 3  # without progress
FIRST_PORT, NUM_PORTS = 20000, 12000  # below those that the system gives to outgoing connections
PORTS_A_JOB = 16
STARTS = ".starts.json"  # in a step's folder: how far it was at each start of a job
GIB = 2**30


def wait_for(names: Sequence[str], present: Callable[[], set[str]], what: str) -> None:
    """Return when `present` holds all names; raise UserError naming the missing ones after the job's waiting time."""
    deadline = time.monotonic() + start_seconds()
    while missing := [name for name in names if name not in present()]:
        if time.monotonic() > deadline:
            raise UserError(
                f"{what}: {', '.join(missing)} did not come within {start_seconds():.0f} s (slurm.start_seconds)"
            )
        time.sleep(0.2)


def free_port(job: int, index: int = 0) -> int:
    """Return a port of this host that is free: a job's own for each index, as long as nobody else has taken it."""
    first = job * PORTS_A_JOB + index
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
    """Return the address under which the job's other nodes reach this one; 127.0.0.1 when it is alone.

    What this host's own name means is often 127.0.1.1; the way to another node leaves by the right interface.
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
    """Return how many GPUs this task may use: those that nvidia-smi finds, without it those that Slurm promised."""
    promised = len([name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()])
    if not promised or shutil.which("nvidia-smi") is None:
        return promised
    shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return min(promised, sum(line.startswith("GPU") for line in shown.splitlines()))


def check_gpus(host: str, found: int, expected: int, what: str) -> None:
    """Raise UserError when a node has fewer GPUs than `what` needs."""
    if found < expected:
        raise UserError(
            f"{host} has {found} GPUs for this job, {what} needs {expected}; set slurm.gpus_per_node (and"
            " slurm.ranks_per_node, generation.workers) to what the nodes have"
        )


def check_disk(host: str, folder: Path, free_gib: int) -> None:
    """Raise UserError when the disk of a folder, or that of this node's temporary files, is nearly full."""
    try:
        require_free_space(folder, free_gib * GIB, "a job (slurm.free_gib)")
        require_free_space(Path(os.environ.get("TMPDIR") or "/tmp"), min(free_gib, 1) * GIB, "a job")
    except UserError as error:
        raise UserError(f"on {host}: {error}") from None


def check_shared(host: str, folder: Path, attempt: str, is_first: bool) -> None:
    """Let the first node put a mark into the run's folder; raise UserError on a node that doesn't see it."""
    mark = folder / f".seen-{attempt}"
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
        return
    deadline = time.monotonic() + min(60.0, start_seconds() / 2)  # what a network file system may keep from us
    while not mark.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"the run's folder {folder.resolve()} is not the same on {host} as on {node_names()[0]}; set run.folder"
                " to a disk that every node sees"
            )
        list(folder.glob("*"))  # makes NFS look again
        time.sleep(0.2)


def progress_of(step: Path) -> list[int]:
    """Return how far a step is: its newest checkpoint's update, its shards, its files.

    The last moves on when a step is done training and exports, or writes its outputs.
    """
    checkpoints = [int(path.name.partition("_")[2]) for path in (step / "checkpoints").glob("step_*")]
    shards = len(list((step / "shards").glob("*.jsonl")))
    files = len([path for path in step.glob("*") if not path.name.startswith(".")])
    return [max(checkpoints, default=0), shards, files]


def count_start(step: Path, job: int, restarts: int) -> None:
    """Note a start of a job; raise UserError when it was requeued MAX_REQUEUES times and is where it was.

    Jobs that are submitted anew count from the beginning.
    """
    path = step / STARTS
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
            f"job {job} was queued again {MAX_REQUEUES} times without progress: {step} still has"
            f" {f'its checkpoint after update {update}' if update else 'no checkpoint'} and {shards} shards. Look for"
            " the cause further up in this log; if the time was too short, raise slurm.time or lower"
            " train.checkpoint_every or generation.shard_size, then submit again"
        )
