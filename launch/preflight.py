"""Check a node of a Slurm job before the work begins; slurm/job.sh runs this on every node at once.

The first node prints a free port, its own address and the run's folder. A node that finds a user error prints
"mistake", since srun may return the exit status of another node. With --count this only records the job's start.
"""

from __future__ import annotations

import os
import socket
import sys

from coalign import process
from coalign.clusters import slurm_node
from coalign.commandline import parse_command_line
from coalign.errors import UserError
from coalign.recipe import run_step
from coalign.runs.run_folder import RunFolder
from coalign.steps import GENERATING_STEPS, STEP_TABLES, TRAINING_STEPS

USAGE = "usage: python launch/preflight.py [--count] STEP [CONFIG.toml] [key=value ...]   # see slurm/job.sh"


def main(argv: list[str]) -> None:
    """Check this node. Raises UserError, which names it."""
    if {"-h", "--help"} & {*argv}:
        print(USAGE)
        return
    try:
        check([word for word in argv if word != "--count"], "--count" in argv)
    except UserError:
        print("mistake", flush=True)
        raise


def check(argv: list[str], count: bool) -> None:
    """Record the job's start (`count`), or check this node. Raises UserError."""
    step, *words = argv or [""]
    if step not in STEP_TABLES:
        raise UserError(f"{step or 'nothing'} is no step; the steps are {', '.join(STEP_TABLES)}. {USAGE}")
    config = parse_command_line(step, words)
    host, is_first = socket.gethostname(), os.environ.get("SLURM_NODEID", "0") == "0"
    job, restarts = int(os.environ.get("SLURM_JOB_ID", "0")), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    run = RunFolder(config.run, words)
    folder = run.own_steps(config.eval.folder).get(step, run.step(step))
    if count:
        slurm_node.count_start(folder, job, restarts)
        return
    slurm_node.check_shared(host, run.path, f"{job}-{restarts}", is_first)
    slurm_node.check_disk(host, run.path, config.slurm.free_gib)
    gpus, nodes = slurm_node.count_gpus(), process.node_names()
    if step in TRAINING_STEPS and (config.slurm.gpus_per_node or gpus):
        ranks = int(os.environ.get("COALIGN_RANKS_PER_NODE", "1"))
        slurm_node.check_gpus(host, gpus, ranks, f"{step} with a rank for each")
        if is_first and ranks < gpus and not config.slurm.ranks_per_node:
            print(f"warning: {host} has {gpus} GPUs, but {ranks} ranks (--ntasks-per-node)", file=sys.stderr)
    if step in GENERATING_STEPS and config.generation.workers and config.slurm.gpus_per_node:
        slurm_node.check_gpus(host, gpus, config.slurm.gpus_per_node, "slurm.gpus_per_node")
    if is_first:
        print(slurm_node.job_port(job), slurm_node.own_address(nodes), run.path.resolve())


if __name__ == "__main__":
    run_step(main)
