"""The jobs of a pipeline: which steps are missing, the sbatch command of each, Slurm's refusals in our words.

Knows Slurm by its commands and what they print, and no engine.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from coalign.clusters.slurm_flags import check_flags, last_flags
from coalign.errors import UserError
from coalign.steps import GENERATING_STEPS, TRAINING_STEPS
from coalign.tables import SlurmTable

MARK = "coalign "  # begins the comment of our jobs; the step's folder follows
# Reasons in squeue's output for which a job can never start.
NEVER = ("PartitionTimeLimit", "PartitionNodeLimit", "PartitionInactive", "PartitionConfig", "BadConstraints")
GONE = "DependencyNeverSatisfied"  # squeue's reason for a job whose dependency has failed
# Words in sbatch's message, and the keys that they are about.
CAUSES = (
    ("partition", "slurm.partition or --partition; `sinfo -s` lists the partitions"),
    ("time limit", "slurm.time or --time; `sinfo -o '%P %l'` lists the limits"),
    ("account", "slurm.account or --account"),
    (
        "node configuration",
        "slurm.nodes, slurm.gpus_per_node, slurm.ranks_per_node, slurm.cpus_per_rank and slurm.memory;"
        " `sinfo -o '%P %D %c %m %G'` lists what nodes have",
    ),
    ("node count", "slurm.nodes or --nodes; `sinfo -s` lists how many there are"),
)


@dataclasses.dataclass(frozen=True)
class QueuedJob:
    """One of our jobs in the queue, as squeue reports it; `folder` is that of its step."""

    number: str
    state: str
    reason: str
    folder: str


@dataclasses.dataclass(frozen=True)
class JobStep:
    """A step of the pipeline: its name, its folder, and the job script that runs it."""

    name: str
    folder: Path
    script: str


def script_of(step: str, workers: int) -> str:
    """Return the job script that runs a step."""
    if step in TRAINING_STEPS:
        return "deepspeed.sbatch"
    return "ray.sbatch" if step in GENERATING_STEPS and workers else "single.sbatch"


def make_logs() -> None:
    """Make the folder of the jobs' logs, without which Slurm fails a job silently. Raises UserError."""
    try:
        Path("logs").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {Path('logs').absolute()} can't be made ({error.strerror}); jobs log there"
        ) from None


def job_name(run_name: str, step: str) -> str:
    """Return the name of a step's job."""
    return f"coalign-{re.sub(r'[^A-Za-z0-9_.-]', '-', run_name)}-{step}"


def make_command(
    root: Path, run_name: str, step: JobStep, flags: Sequence[str], words: Sequence[str], after: str
) -> list[str]:
    """Return the sbatch command of a step; `after` is the number of the job that must succeed first, "" for none."""
    command = [
        "sbatch",
        "--parsable",
        f"--job-name={job_name(run_name, step.name)}",
        f"--comment={MARK}{step.folder.resolve()}",
    ]
    command += ["--output=logs/%x-%j.out", "--open-mode=append", "--requeue"]
    given = [flag for flag in flags if flag.startswith("--dependency=")]
    conditions = [f"afterok:{after}"] if after else []
    conditions += [flag.partition("=")[2] for flag in given[-1:]]  # of several, sbatch takes the last
    if conditions:
        command += [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"]
    flags = [flag for flag in flags if flag not in given]
    return [*command, *flags, *last_flags(step.name), str(root / "slurm" / step.script), step.name, *words]


def job_environment(table: SlurmTable, root: Path) -> dict[str, str]:
    """Return the variables that give [slurm] to a job, beside the login shell's own, which it inherits too."""
    venv = table.venv or ("" if table.container else os.environ.get("VIRTUAL_ENV", ""))
    return {
        "COALIGN_ROOT": str(root),
        "COALIGN_MODULES": " ".join(table.modules),
        "COALIGN_VENV": str(Path(venv).resolve()) if venv else "",
        "COALIGN_CONTAINER": table.container,
        "COALIGN_START_SECONDS": str(table.start_seconds),
    }


def call(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Run a command of Slurm's and return what it prints. Raises UserError with its message and the keys to check."""
    try:
        done = subprocess.run(
            command, env=os.environ | (environment or {}), capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} was not found; run this on a login node, where Slurm's commands are") from error
    if done.returncode == 0:
        return done.stdout.strip()
    message = done.stderr.strip() or done.stdout.strip()
    hints = [hint for word, hint in CAUSES if word in message.lower()]
    raise UserError(f"{message} {f'Look at {hints[0]}.' if hints else ''} The command: {shlex.join(command)}")


def queued_jobs() -> list[QueuedJob]:
    """Return our jobs that are pending or running."""
    jobs = []
    for line in call(["squeue", "--me", "--noheader", "--format=%i|%T|%r|%k"]).splitlines():
        number, state, reason, comment = line.split("|", 3)
        if comment.startswith(MARK):
            jobs.append(QueuedJob(number, state, reason, comment.removeprefix(MARK)))
    return jobs


@dataclasses.dataclass(frozen=True)
class SubmitRequest:
    """The command line of slurm/pipeline.sh: its own options, the flags of sbatch, the words of the config."""

    only: str
    dry_run: bool
    settings: bool
    flags: tuple[str, ...]
    words: tuple[str, ...]


def read_words(argv: Sequence[str], steps: Sequence[str]) -> SubmitRequest:
    """Sort the words of slurm/pipeline.sh's command line. Raises UserError."""
    only, dry_run, settings = "", False, False
    flags: list[str] = []
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word == "--only" or word.startswith("--only="):
            only = word.partition("=")[2] or next(rest, "")
            if not only:
                raise UserError(f"no step was named; the steps are {', '.join(steps)}, see slurm/pipeline.sh --help")
            if only not in steps:
                raise UserError(f"--only {only or 'nothing'}: no such step; the steps are {', '.join(steps)}")
        elif word == "--dry-run":
            dry_run = True
        elif word == "--settings":
            settings = True
        elif not word.startswith("-"):
            words.append(word)
        else:
            check_flags([word])
            flags.append(word)
    return SubmitRequest(only, dry_run, settings, tuple(flags), tuple(words))


def list_jobs(
    steps: Sequence[JobStep], complete: Sequence[str], queued: Sequence[QueuedJob]
) -> tuple[list[JobStep], dict[str, QueuedJob], list[QueuedJob]]:
    """Return the steps to submit, {step: its job} of those in the queue, and the queued jobs to cancel.

    `steps` are in order, each needs the one before it. A job is to be cancelled when what it waits for has failed or is
    submitted anew.
    """
    by_folder = {job.folder: job for job in queued if job.reason != GONE}
    missing: list[JobStep] = []
    kept: dict[str, QueuedJob] = {}
    orphans = [job for job in queued if job.reason == GONE and job.folder in {str(s.folder.resolve()) for s in steps}]
    for step in steps:
        job = by_folder.get(str(step.folder.resolve()))
        if step.name in complete:
            continue
        if job is None:
            missing.append(step)
        elif missing and job.state == "PENDING":
            orphans.append(job)
            missing.append(step)
        else:
            kept[step.name] = job
    return missing, kept, orphans


def submit(
    missing: Sequence[JobStep],
    before: dict[str, str],
    command_of: Callable[[JobStep, str], list[str]],
    env: dict[str, str],
) -> dict[str, str]:
    """Queue steps, each after the newest one before it, and return {step: job number}.

    `before` holds the jobs of earlier steps that are in the queue already. Raises UserError when Slurm refuses one;
    then none stays in the queue.
    """
    numbers: dict[str, str] = {}
    try:
        for step in missing:
            after = [*numbers.values()][-1:] or [before[name] for name in [*before][-1:]]
            numbers[step.name] = call(command_of(step, *after or [""]), env).partition(";")[0]
        refuse_hopeless(numbers)
    except UserError:
        if numbers:  # half a pipeline is of no use
            call(["scancel", *numbers.values()])
        raise
    return numbers


def report_lines(
    steps: Sequence[str], queued: dict[str, QueuedJob], submitted: dict[str, str], run_name: str
) -> list[str]:
    """Return the state of each step, one line per step, and how to follow and stop the jobs just submitted."""
    known = {name: f"job {job.number}, {job.state.lower()} already" for name, job in queued.items()}
    known |= {name: f"job {number}, submitted" for name, number in submitted.items()}
    lines = [f"{name:<11} {known.get(name, 'complete')}" for name in steps]
    if submitted:
        name, number = next(iter(submitted.items()))
        lines += ["", "follow them: squeue --me"]
        lines.append(f"             tail -F logs/{job_name(run_name, name)}-{number}.out")
        lines.append(f"stop them:   scancel {' '.join(submitted.values())}")
    return lines


def refuse_hopeless(numbers: dict[str, str]) -> None:
    """Raise UserError when Slurm says that one of these jobs can never start as it is."""
    lines = call(["squeue", "--me", "--noheader", "--format=%i|%r"]).splitlines()
    for number, _, reason in (line.partition("|") for line in lines):
        if number in numbers.values() and reason in NEVER:
            raise UserError(
                f"job {number} could never start ({reason}); see slurm.partition, slurm.time and slurm.nodes"
            )
