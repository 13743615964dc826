"""Queue the steps of a pipeline that are missing, each after the one before it; slurm/pipeline.sh calls this."""

from __future__ import annotations

import shlex
from pathlib import Path

from coalign.clusters import slurm_flags, slurm_jobs
from coalign.commandline import parse_command_line
from coalign.config import Config
from coalign.recipe import run_step
from coalign.runs.run_folder import RunFolder
from coalign.runs.step_folder import read_manifest
from coalign.steps import STEP_TABLES

ROOT = Path(__file__).resolve().parents[1]
USAGE = """usage: slurm/pipeline.sh [CONFIG.toml] [key=value ...] [--only STEP] [--dry-run] [flags of sbatch]

Queues prepare, paraphrase, sft, sample, judge, rank, align and eval, each to start when the one before it has
succeeded. A step that is complete or in the queue already is passed over, so the same command goes on after a failure.
A step that fails cancels those that wait for it.

What each job asks for comes from the table [slurm] of the config (docs/config.md explains every key). Other words
that begin with -- are given to sbatch as they stand, for every job, and win: --partition=long --account=me.

  --only STEP   queue this step alone
  --dry-run     print sbatch's commands and queue nothing
  --settings    print what a job gets of [slurm] and queue nothing; jobs ask this that were made without this command"""


def main(argv: list[str]) -> None:
    """Plan, submit what is missing, and say how to follow it."""
    if {"-h", "--help"} & {*argv}:
        print(USAGE)
        return
    request = slurm_jobs.read_words(argv, [*STEP_TABLES])
    config = parse_command_line("pipeline", [*request.words])
    table, generation = config.slurm, config.generation
    if request.settings:
        for name, value in slurm_jobs.job_environment(table, ROOT).items():
            print(f"{name}={value}")
        return
    slurm_flags.check_resources(table, generation.workers, generation.gpus_per_worker)
    slurm_flags.check_flags([*table.options, *request.flags])
    slurm_flags.check_time(table, [*table.options, *request.flags])
    steps = [step for step in find_steps(config) if request.only in ("", step.name)]

    def command_of(step: slurm_jobs.JobStep, after: str) -> list[str]:
        flags = [*slurm_flags.resource_flags(table, step.name, step.script), *request.flags]
        return slurm_jobs.make_command(ROOT, config.run.name, step, flags, request.words, after)

    complete = [step.name for step in steps if read_manifest(step.folder) is not None]
    if request.dry_run:
        missing = [step for step in steps if step.name not in complete]
        for before, step in zip([None, *missing], missing, strict=False):
            print(shlex.join(command_of(step, f"JOB_{before.name}" if before else "")))
        return
    missing, queued, orphans = slurm_jobs.list_jobs(steps, complete, slurm_jobs.queued_jobs())
    for job in orphans:
        slurm_jobs.call(["scancel", job.number])
        print(f"cancelled job {job.number} of {job.folder}: what it waited for is gone")
    slurm_jobs.make_logs()
    running = {name: job.number for name, job in queued.items()}
    submitted = slurm_jobs.submit(missing, running, command_of, slurm_jobs.job_environment(table, ROOT))
    for step in steps:
        known = {name: f"job {job.number}, {job.state.lower()} already" for name, job in queued.items()}
        known |= {name: f"job {number}, submitted" for name, number in submitted.items()}
        print(f"{step.name:<11} {known.get(step.name, 'complete')}")
    if submitted:
        name, number = next(iter(submitted.items()))
        print("\nfollow them: squeue --me")
        print(f"             tail -F logs/{slurm_jobs.job_name(config.run.name, name)}-{number}.out")
        print(f"stop them:   scancel {' '.join(submitted.values())}")


def find_steps(config: Config) -> list[slurm_jobs.JobStep]:
    """Return the steps of this run in order, without those that come from another run."""
    run = RunFolder(config.run, [])
    folders = {name: run.step(name) for name in STEP_TABLES if name not in config.run.inputs}
    if config.eval.folder:
        folders["eval"] = Path(config.eval.folder)
    workers = config.generation.workers
    return [slurm_jobs.JobStep(name, path, slurm_jobs.script_of(name, workers)) for name, path in folders.items()]


if __name__ == "__main__":
    run_step(main)
