"""The machine that a plan is for, as options of launch/plan.py: GPUs and their speed, a model's shape, assumed counts.

Knows no formula, and looks at no device of the machine that it runs on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from coalign.config import ModelTable, TrainTable
from coalign.errors import UserError
from coalign.models.known_shapes import KNOWN, find_shape, known_shape
from coalign.models.shape import Shape, shape_of_numbers, words_of_numbers
from coalign.planning.data_counts import Assumed
from coalign.tables import SlurmTable

ASSUMED = Assumed()
GPUS = 8  # where nothing says how many


def _option(default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclasses.dataclass(frozen=True, slots=True)
class MachineOptions:
    """The options of the command, beside the config: the machine, the model's shape, what is assumed.

    Each field's `meaning` is its text in --help, with its unit.
    """

    gpus: int = _option(0, f"number of GPUs (0: what [slurm] asks for, else train.ray_ranks, else {GPUS})")
    ranks: int = _option(0, "training ranks, each with one GPU (0: as many as GPUs)")
    gpu_memory: float = _option(80.0, "memory per GPU, GB of 10^9 bytes")
    gpu_tflops: float = _option(989.0, "peak per GPU, 10^12 dense bf16 FLOP/s (989: H100 SXM, 312: A100)")
    mfu: float = _option(0.35, "share of the peak reached in training and in reading prompts; an assumption")
    generation_mfu: float = _option(0.05, "share of the peak reached in generating tokens; an assumption")
    shape: str = _option("", f"a known shape: {', '.join(KNOWN)}")
    parameters: int = _option(0, "number of weights (0: counted from the shape)")
    layers: int = _option(0, "decoder layers; with hidden it describes a Llama-like model")
    hidden: int = _option(0, "width of the model")
    heads: int = _option(0, "attention heads (0: hidden / 128)")
    kv_heads: int = _option(0, "key and value heads (0: as many as heads)")
    intermediate: int = _option(0, "width inside the MLP (0: 8/3 of the width)")
    vocabulary: int = _option(0, "entries of the tokenizer (0: 32000)")
    context: int = _option(0, "tokens of context (0: 4096); this and the four above need layers and hidden")
    tasks: int = _option(ASSUMED.tasks, "tasks, while prepare is not complete and no limit is set")
    inputs: int = _option(ASSUMED.inputs, "inputs per task and split, where no limit is set")
    prompt_tokens: int = _option(ASSUMED.prompt_tokens, "tokens of a prompt, while prepare is not complete")
    answer_tokens: int = _option(ASSUMED.answer_tokens, "tokens of an answer, while prepare is not complete")
    table: bool = _option(False, "print the sizing table of docs/planning.md and nothing else")


def plan_usage() -> str:
    """Return what --help prints."""
    lines = ["usage: python launch/plan.py [CONFIG.toml] [key=value ...] [--option value ...]", ""]
    lines += ["Prints what a run needs, from formulas: memory per GPU, disk, tokens, FLOPs, hours. Runs nothing."]
    lines += ["Exit status 2 when the run can't fit, with the smallest change that makes it fit.", "", "Options:"]
    for field in dataclasses.fields(MachineOptions):
        default = "" if field.default in (0, "", False) else f" (default {field.default})"
        lines.append(f"  --{field.name.replace('_', '-'):17} {field.metadata['meaning']}{default}")
    return "\n".join([*lines, "", "Without a config: configs/tiny.toml. For the keys see --help of a step."])


def read_machine_options(argv: Sequence[str]) -> tuple[MachineOptions, list[str]]:
    """Return the options and the other words: a config and key=value. Raises UserError for a bad option."""
    fields = {f"--{field.name.replace('_', '-')}": field for field in dataclasses.fields(MachineOptions)}
    found: dict[str, Any] = {}
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        elif name not in fields:
            raise UserError(f"unknown option {name!r}; see --help")
        elif name == "--table":
            found["table"] = True
        else:
            if not equals and not rest:
                raise UserError(f"{name} needs a value, such as {name} {fields[name].default or 8}")
            found[fields[name].name] = _value(name, fields[name].default, value if equals else rest.pop(0))
    options = MachineOptions(**{**({"gpus": found["ranks"]} if found.get("ranks") else {}), **found})
    for name, share in (("--mfu", options.mfu), ("--generation-mfu", options.generation_mfu)):
        if share > 1:
            raise UserError(f"{name} {share:g} is a share of the GPU's peak; use a number up to 1, such as 0.35")
    if options.ranks > options.gpus:
        raise UserError(f"--ranks {options.ranks} with --gpus {options.gpus}: a rank needs a GPU of its own")
    return options, words


def find_gpus(options: MachineOptions, slurm: SlurmTable, train: TrainTable) -> tuple[MachineOptions, str]:
    """Return the options with the numbers of GPUs and ranks, and where they are from ("" where --gpus gave them).

    Raises UserError when [slurm] asks for more ranks than GPUs.
    """
    if options.gpus:
        return options, ""
    if not slurm.gpus_per_node:
        source = (
            f"train.ray_ranks={train.ray_ranks}"
            if train.ray_ranks
            else "an assumption, since neither [slurm] nor train.ray_ranks gives a number"
        )
        gpus = ranks = train.ray_ranks or GPUS
    else:
        source = f"slurm.nodes={slurm.nodes} x slurm.gpus_per_node={slurm.gpus_per_node}"
        gpus = slurm.nodes * slurm.gpus_per_node
        ranks = slurm.nodes * (slurm.ranks_per_node or slurm.gpus_per_node)
        if slurm.ranks_per_node:
            source += f", slurm.ranks_per_node={slurm.ranks_per_node}"
    if ranks > gpus:
        raise UserError(f"{source}: a rank needs a GPU of its own")
    return dataclasses.replace(options, gpus=gpus, ranks=ranks), f"{gpus} GPUs, {ranks} ranks (--gpus): {source}"


def find_model(model: ModelTable, options: MachineOptions) -> tuple[Shape, str]:
    """Return the model's shape and where it was found. Raises UserError when it is unknown or options contradict."""
    numbers = dataclasses.asdict(options)
    if not options.shape:
        return (shape_of_numbers(numbers), "options") if words_of_numbers(numbers) else find_shape(model)
    shape = dataclasses.replace(known_shape(options.shape), given_parameters=options.parameters)
    if more := words_of_numbers(numbers | {"parameters": 0}):
        raise UserError(f"--shape {options.shape} has its own widths; leave out {more}, or --shape")
    return shape, f"--shape {options.shape}"


def _value(name: str, default: Any, text: str) -> Any:
    """Return an option's value in the type of its default; 7e9 counts as a whole number. Raises UserError."""
    if isinstance(default, str):
        return text
    try:
        number = float(text)
        whole = int(number) == number
    except (ValueError, OverflowError) as error:
        raise UserError(f"{name} {text}: a number was expected") from error
    if not number > 0 or (isinstance(default, int) and not whole):
        raise UserError(f"{name} {text}: a {'whole ' if isinstance(default, int) else ''}number above 0 was expected")
    return int(number) if isinstance(default, int) else number
