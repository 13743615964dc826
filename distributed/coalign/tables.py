"""What a table of the configuration is made of, and the one that only Slurm reads.

config.py, model_tables.py and training_tables.py hold the other tables. A key is a path by its type, `FilePath`, and
never holds a line break by `Line`. Knows neither files nor steps.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from coalign.display import has_control, on_one_line

_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{[A-Za-z_]\w*\})")
MAX_COUNT = 2**31 - 1  # of anything; the libraries below take 32 bits for some of it
MAX_NUMBER = 1e9  # of a number that is no count
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
NonNegative = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveNumber = Annotated[float, Field(gt=0, le=MAX_NUMBER)]
NonNegativeNumber = Annotated[float, Field(ge=0, le=MAX_NUMBER)]
Temperature = Annotated[float, Field(ge=1e-4, le=100)]


def one_line(text: str) -> str:
    """Return a text of the config. Raises ValueError for line breaks and other control characters in it."""
    if has_control(text):
        raise ValueError(f"{on_one_line(text)} has a control character or line break in it; take it out")
    return text


def full_path(text: str) -> str:
    """Return a path with the home folder for ~ and the values of environment variables for $NAME.

    A hub name, "" and a step's name are returned unchanged. Raises ValueError for a variable that is not set.
    """
    found = os.path.expandvars(one_line(text))
    if missing := _VARIABLE.search(found):
        raise ValueError(
            f"{text}: the environment has no variable {missing.group().strip('${}')}; set it, or write it out"
        )
    found = os.path.expanduser(found)  # noqa: PTH111  a Path would drop ./ and a slash at the end
    if found.startswith("~"):
        raise ValueError(f"{text}: {found.partition('/')[0]} has no home folder here; write ./~ for a folder named so")
    return one_line(found)


def run_name(text: str) -> str:
    """Return run.name. Raises ValueError when it is no name, or leads out of run.folder."""
    parts = one_line(text).split("/")
    if any(part.strip() in ("", ".", "..") for part in parts) or text.startswith("~") or text != text.strip():
        raise ValueError(f"{json.dumps(text)} is no name of a folder inside run.folder; use letters, such as demo")
    return text


def _each(check: Callable[[str], str]) -> Callable[[Any], Any]:
    """Return a check for every text of a list or of a dict's values; a dict's names are on one line."""

    def check_all(values: Any) -> Any:
        if isinstance(values, dict):
            return {one_line(name): check(value) for name, value in values.items()}
        return [check(value) for value in values]

    return check_all


def _source_path(text: str) -> str:
    if not text.strip():
        raise ValueError('"" names no data; give a folder, a file or a hub name')
    return full_path(text)


Line = Annotated[str, AfterValidator(one_line)]
Lines = Annotated[list[str], AfterValidator(_each(one_line))]
FilePath = Annotated[str, AfterValidator(full_path)]
FilePaths = Annotated[list[str], AfterValidator(_each(full_path))]
SourcePath = Annotated[str, AfterValidator(_source_path)]
NamedPaths = Annotated[dict[str, str], AfterValidator(_each(full_path))]
RunName = Annotated[str, AfterValidator(run_name)]


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

    partition: Line = key("", "partition (empty: the cluster's default)", neutral=True)
    account: Line = key("", "account that is charged (empty: your default)", neutral=True)
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
    memory: Line = key(
        "", "memory per node, as sbatch --mem takes it: 200G (empty: the partition's default)", neutral=True
    )
    time: Line = key("24:00:00", "time limit of each job, [days-]hours:minutes:seconds", neutral=True)
    warn_seconds: Positive = key(
        120, "seconds before the limit at which a job saves its work and queues itself again", neutral=True
    )
    start_seconds: Positive = key(
        300, "seconds that a job waits for all its nodes and ranks before it names the missing ones", neutral=True
    )
    free_gib: NonNegative = key(10, "GiB that must be free on the disk of run.folder when a job starts", neutral=True)
    modules: Lines = key([], "environment modules that a job loads first", neutral=True)
    venv: FilePath = key(
        "", "virtual environment that a job activates (empty: the one that you submit with)", neutral=True
    )
    container: Line = key(
        "",
        "command that runs another in a container, e.g. apptainer exec --nv coalign.sif; venv is inside",
        neutral=True,
    )
    options: Lines = key([], "further flags of sbatch for every job, e.g. --constraint=a100", neutral=True)
