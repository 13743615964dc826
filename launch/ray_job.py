"""The eight steps in order on a Ray cluster, which places both the training ranks and the workers.

Submit it:  ray job submit --runtime-env configs/ray_job.yaml -- python launch/ray_job.py CONFIG.toml [key=value ...]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from coalign.clusters.ray_connection import Cluster, ray_address
from coalign.clusters.training_ranks import RankRequest, require_ranks, run_ranks
from coalign.clusters.worker_pool import require_workers
from coalign.commandline import parse_command_line
from coalign.config import Config
from coalign.errors import UserError
from coalign.recipe import run_command, run_step, set_up_logging
from coalign.runs.run_folder import RunFolder, incomplete
from coalign.runs.step_folder import read_manifest
from coalign.steps import TRAINING_STEPS


def main(argv: list[str]) -> None:
    """Run every step that is not complete; exit with the status of the first that fails."""
    config = parse_command_line("ray_job", argv)
    set_up_logging(config.log.level)
    address = ray_address(config.generation)
    if not address:
        raise UserError(
            "no Ray cluster is named; submit this with ray job submit (docs/running.md), or set RAY_ADDRESS or"
            " generation.ray_address; without a cluster use launch/local.sh"
        )
    os.environ["RAY_ADDRESS"] = address  # for the steps
    folders = RunFolder(config.run, []).own_steps(config.eval.folder)

    cluster = Cluster(address, 0)
    cluster.require_shared(Path(config.run.folder))
    left = incomplete(folders)
    if {*left} & {*TRAINING_STEPS}:
        require_ranks(cluster, _request("align", argv, config))
    if left and config.generation.workers:
        require_workers(cluster, config.generation)
    for step, folder in folders.items():
        print(f"== {step}", flush=True)
        started = time.monotonic()
        if step in TRAINING_STEPS and read_manifest(folder) is None:
            status = run_ranks(cluster, _request(step, argv, config), step)
        else:  # a complete step logs that it is, or why it is stale
            status = run_command([sys.executable, _script(step), *argv])
        if status:
            print(f"ray_job: the step {step} failed (exit status {status}); fix the error and submit again", flush=True)
            raise SystemExit(status if status > 0 else 128 - status)
        print(f"== {step} done in {time.monotonic() - started:.0f} s", flush=True)
    cluster.close()


def _script(step: str) -> str:
    return os.path.relpath(Path(__file__).with_name(f"{step}.py"))


def _request(step: str, argv: list[str], config: Config) -> RankRequest:
    train, generation = config.train, config.generation
    command = (_script(step), *argv)
    return RankRequest(
        command, train.ray_ranks, train.ray_cpus_per_rank, generation.ray_wait_seconds, generation.ray_grows
    )


if __name__ == "__main__":
    run_step(main)
