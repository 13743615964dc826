"""The resource flags of sbatch: what a step's job asks for, which flags are refused, which settings contradict.

slurm_jobs adds names, logs and dependencies. Pure text and numbers; runs no command.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from coalign.errors import UserError
from coalign.steps import GENERATING_STEPS, TRAINING_STEPS
from coalign.tables import SlurmTable

# Flags that would break the chain of jobs or its traces, and what to do instead.
REFUSED = {
    "comment": "pipeline.sh recognises its jobs by it",
    "job-name": "logs are named after it; use run.name",
    "output": "logs lie in logs/",
    "array": "a step is one job; give each run its own run.name",
    "wrap": "the job scripts are the command",
    "wait": "each job waits for the one before it",
    "parsable": "pipeline.sh prints the job numbers",
    "test-only": "use --dry-run",
}


# Flags of sbatch with a value, which must follow in the same word.
WITH_VALUE = (
    *("partition", "account", "time", "nodes", "qos", "reservation", "constraint", "mem", "gres", "gpus-per-node"),
    *("dependency", "gpus", "cpus-per-task", "nodelist", "exclude", "mail-user", "mail-type", "licenses", "chdir"),
)


def ranks_per_node(table: SlurmTable) -> int:
    """Return the training ranks per node."""
    return table.ranks_per_node or table.gpus_per_node or 1


def resource_flags(table: SlurmTable, step: str, script: str) -> list[str]:
    """Return the flags of a step's job; the user's own flags come after these and win."""
    named = {"partition": table.partition, "account": table.account, "mem": table.memory, "time": table.time}
    flags = [f"--{name}={value}" for name, value in named.items() if value]
    flags += [f"--signal=B:USR1@{table.warn_seconds}", *table.options]
    cpus = ranks_per_node(table) * table.cpus_per_rank
    if script == "deepspeed.sbatch":
        flags += [f"--ntasks-per-node={ranks_per_node(table)}", f"--cpus-per-task={table.cpus_per_rank}"]
    else:
        flags += ["--ntasks-per-node=1", f"--cpus-per-task={cpus if step in GENERATING_STEPS else table.cpus_per_rank}"]
    if step not in (*TRAINING_STEPS, *GENERATING_STEPS):
        return flags
    if table.gpus_per_node:
        flags.append(f"--gpus-per-node={table.gpus_per_node}")
    return [f"--nodes={1 if script == 'single.sbatch' else table.nodes}", *flags]


def last_flags(step: str) -> list[str]:
    """Return the flags that win over the user's: a step without a model takes one node without GPUs."""
    return (
        []
        if step in (*TRAINING_STEPS, *GENERATING_STEPS)
        else ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0"]
    )


def check_resources(table: SlurmTable, workers: int, gpus_per_worker: float) -> None:
    """Raise UserError when settings of [slurm] and [generation] contradict each other, before anything is queued."""
    ranks, gpus = ranks_per_node(table), table.gpus_per_node
    if gpus and ranks > gpus:
        raise UserError(f"slurm.ranks_per_node={ranks} with slurm.gpus_per_node={gpus}: a rank needs a GPU of its own")
    cpus = table.nodes * ranks * table.cpus_per_rank
    if workers > cpus:
        raise UserError(
            f"generation.workers={workers}, but {table.nodes} nodes with {ranks} x {table.cpus_per_rank} cores have"
            f" {cpus}; raise slurm.nodes, slurm.ranks_per_node or slurm.cpus_per_rank"
        )
    if workers * max(gpus_per_worker, 0) > table.nodes * gpus:
        raise UserError(
            f"generation.workers={workers} x gpus_per_worker={gpus_per_worker:g}, but {table.nodes} nodes with"
            f" slurm.gpus_per_node={gpus} have {table.nodes * gpus}"
        )


def check_flags(flags: Sequence[str]) -> None:
    """Raise UserError for the first flag of sbatch that a pipeline refuses."""
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0]
        # sbatch would take any other word for the job script, and the next for the value of a short flag.
        if not flag.startswith("--") or not name or flag.removeprefix("--") in WITH_VALUE:
            raise UserError(
                f"{flag!r}: write sbatch's flags (also in slurm.options) as one word, in the long form, such as"
                " --partition=long"
            )
        if refused := [other for other in REFUSED if other.startswith(name)]:  # sbatch takes the beginning of a name
            raise UserError(f"{flag} can't be given to a pipeline: {REFUSED[refused[0]]}")


def check_time(table: SlurmTable, flags: Sequence[str]) -> None:
    """Raise UserError when the time limit is so short that a job would soon be told to stop."""
    given = [flag.removeprefix("--time=") for flag in flags if flag.startswith("--time=")]
    limit = given[-1] if given else table.time
    seconds = parse_seconds(limit) if limit else None
    if seconds is not None and seconds < 2 * table.warn_seconds:
        raise UserError(
            f"a time limit of {limit} is too short: a job is told to save and stop {table.warn_seconds} s before"
            f" its end (slurm.warn_seconds); give at least {-(-2 * table.warn_seconds // 60)} minutes"
        )


def parse_seconds(text: str) -> int | None:
    """Return the seconds of a time limit as sbatch reads it; None: unlimited. Raises UserError for other text."""
    if text.upper() in ("UNLIMITED", "INFINITE", "-1"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UserError(f"slurm.time={text!r} is not a time limit; write, for example, 24:00:00 or 2-00:00:00")
    days, first, second, third = (int(part) if part else None for part in match.groups())
    assert first is not None
    if days is not None:
        hours, minutes, seconds = first, second or 0, third or 0
    elif third is not None:
        hours, minutes, seconds = first, second or 0, third
    else:
        hours, minutes, seconds = 0, first, second or 0
    return ((days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds
