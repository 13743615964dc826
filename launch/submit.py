"""Queue the missing steps of a pipeline, each after the one before it; slurm/pipeline.sh calls this."""

from __future__ import annotations

import shlex
from pathlib import Path

from coalign.clusters import slurm_flags, slurm_jobs
from coalign.commandline import parse_command_line
from coalign.config import Config
from coalign.recipe import run_step
from coalign.runs.run_folder import RunFolder, incomplete
from coalign.steps import STEP_TABLES

ROOT = Path(__file__).resolve().parents[1]
USAGE = """usage: slurm/pipeline.sh [CONFIG.toml] [key=value ...] [--only STEP] [--dry-run] [flags of sbatch]

Queues prepare, paraphrase, sft, sample, judge, rank, align and eval. Each starts when the one before it has succeeded.
Steps that are complete or in the queue are skipped, so the same command continues after a failure. When a step fails,
those that wait for it are cancelled.

The table [slurm] of the config says what each job asks for (docs/config.md explains every key). Other words that begin
with -- go to sbatch unchanged, for every job, and win: --partition=long --account=me.

  --only STEP   queue this step alone
  --dry-run     print sbatch's commands and queue nothing
  --settings    print what a job gets of [slurm] and queue nothing; for jobs made by sbatch or salloc itself"""


def main(argv: list[str]) -> None:
    """Queue what is missing and print how to follow it."""
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

    left = incomplete({step.name: step.folder for step in steps})
    complete = [step.name for step in steps if step.name not in left]
    if request.dry_run:
        missing = [step for step in steps if step.name not in complete]
        for before, step in zip([None, *missing], missing, strict=False):
            print(shlex.join(command_of(step, f"JOB_{before.name}" if before else "")))
        return
    missing, queued, orphans = slurm_jobs.list_jobs(steps, complete, slurm_jobs.queued_jobs())
    for job in orphans:
        slurm_jobs.call(["scancel", job.number])
        print(f"cancelled job {job.number} of {job.folder}: what it waited for has failed or gone")
    slurm_jobs.make_logs()
    running = {name: job.number for name, job in queued.items()}
    submitted = slurm_jobs.submit(missing, running, command_of, slurm_jobs.job_environment(table, ROOT))
    print("\n".join(slurm_jobs.report_lines([step.name for step in steps], queued, submitted, config.run.name)))


def find_steps(config: Config) -> list[slurm_jobs.JobStep]:
    """Return the steps of this run in order, without those taken from another run."""
    folders = RunFolder(config.run, []).own_steps(config.eval.folder)
    workers = config.generation.workers
    return [slurm_jobs.JobStep(name, path, slurm_jobs.script_of(name, workers)) for name, path in folders.items()]


if __name__ == "__main__":
    run_step(main)
