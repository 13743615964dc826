"""What a table of the configuration is made of, and the table that only Slurm reads.

config.py holds the other tables. Knows neither files nor steps.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


def key(default: Any, description: str, *, neutral: bool = False, later: bool = False) -> Any:
    """Declare a key. A `neutral` key can't change any result, so changing it makes no step stale.

    A `later` key came after the first runs. At its default a manifest leaves it out, as theirs do.
    """
    extra: JsonDict | None = {"neutral": True} if neutral else {"later": True} if later else None
    if isinstance(default, dict | list):
        return Field(default_factory=lambda: default.copy(), description=description, json_schema_extra=extra)
    return Field(default, description=description, json_schema_extra=extra)


class Table(BaseModel):
    """A TOML table."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SlurmTable(Table):
    """[slurm]: what slurm/pipeline.sh asks of Slurm for each job; flags of sbatch on its command line win."""

    partition: str = key("", "partition (empty: the cluster's default)", neutral=True)
    account: str = key("", "account that is charged (empty: your default)", neutral=True)
    nodes: Positive = key(
        1, "nodes per job of a step with a model; prepare and rank take one node without GPUs", neutral=True
    )
    gpus_per_node: NonNegative = key(0, "GPUs per node (0: train and generate on CPUs)", neutral=True)
    ranks_per_node: NonNegative = key(
        0, "training processes per node (0: one per GPU, and one where there are no GPUs)", neutral=True
    )
    cpus_per_rank: Positive = key(
        4, "CPU cores per rank; Ray's workers get the cores of all ranks of a node", neutral=True
    )
    memory: str = key(
        "", "memory per node, as sbatch --mem takes it: 200G (empty: the partition's default)", neutral=True
    )
    time: str = key("24:00:00", "time limit of each job, [days-]hours:minutes:seconds", neutral=True)
    warn_seconds: Positive = key(
        120, "seconds before the limit at which a job saves its work and queues itself again", neutral=True
    )
    start_seconds: Positive = key(
        300, "seconds that a job waits for all its nodes and ranks before it names the missing ones", neutral=True
    )
    free_gib: NonNegative = key(10, "GiB that must be free on the disk of run.folder when a job starts", neutral=True)
    modules: list[str] = key([], "environment modules that a job loads first", neutral=True)
    venv: str = key("", "virtual environment that a job activates (empty: the one that you submit with)", neutral=True)
    container: str = key(
        "",
        "command that runs another in a container, e.g. apptainer exec --nv coalign.sif; venv is inside",
        neutral=True,
    )
    options: list[str] = key([], "further flags of sbatch for every job, e.g. --constraint=a100", neutral=True)
