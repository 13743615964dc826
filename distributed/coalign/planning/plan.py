"""The plan of a run before anything runs: whether it fits a machine, and the smallest change that makes it fit.

Used by sizing and launch/plan.py. The formulas are in memory and workload, the models in shapes, the machine in
machine; here they meet. Starts nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from coalign.models.shape import Shape, count_lora_parameters, count_parameters
from coalign.models.worker_memory import CONTEXT_BYTES, GB, Memory, element_bytes, generation_memory, tokens_in_flight
from coalign.planning.data_counts import Assumed, Counts, make_counts
from coalign.planning.machine import MachineOptions, find_gpus, find_model
from coalign.planning.training_memory import Training, training_memory
from coalign.planning.workload import Tables, row_widths
from coalign.runs.run_folder import RunFolder

MAX_RANKS = 1024  # more than these are not proposed
MIN_TOKENS = 128  # a smaller micro-batch or batch is not proposed
WORKER_GPUS = (1.0, 2.0, 4.0, 8.0)  # of a worker; they are GPUs of one node

Changes = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A configuration, the model's shape and where it was found, what there is to do, the machine, why that."""

    tables: Tables
    shape: Shape
    source: str
    counts: Counts
    options: MachineOptions
    gpus_source: str = ""
    automatic_tokens: bool = False  # generation.batch_tokens is what a worker would take

    @property
    def ranks(self) -> int:
        """Return the number of training processes."""
        return self.options.ranks or self.options.gpus

    @property
    def gpu_bytes(self) -> float:
        """Return the memory of a GPU."""
        return self.options.gpu_memory * GB

    @property
    def worker_gpus(self) -> float:
        """Return the GPUs of a generation worker; -1 in the config means one."""
        wanted = self.tables.generation.gpus_per_worker
        return wanted if wanted > 0 else 1.0


def make_plan(tables: Tables, options: MachineOptions) -> Plan:
    """Return the plan of a configuration. Raises UserError when the model's shape can't be found, or contradicted."""
    model = tables.model
    shape, source = find_model(model, options)
    context = min(shape.context, model.max_tokens or shape.context)
    assumed = Assumed(options.tasks, options.inputs, options.prompt_tokens, options.answer_tokens)
    counts = make_counts(RunFolder(tables.run, []).step("prepare"), tables.data, assumed, context)
    if model.lora.enabled:
        count_lora_parameters(shape, model.lora)  # says now which target module there isn't
    plan = Plan(tables, shape, source, counts, *find_gpus(options, tables.slurm, tables.train))
    return plan if tables.generation.batch_tokens else _with_automatic_tokens(plan)


def _with_automatic_tokens(plan: Plan) -> Plan:
    """Return the plan with the generation.batch_tokens that a worker takes where it is 0."""
    dtype = plan.tables.generation.dtype
    free = plan.worker_gpus * plan.gpu_bytes - element_bytes(dtype) * count_parameters(plan.shape) - CONTEXT_BYTES
    plan = changed(plan, {"generation.batch_tokens": tokens_in_flight(plan.shape, dtype, free)})
    return dataclasses.replace(plan, automatic_tokens=True)


def training_memories(plan: Plan) -> dict[str, Memory]:
    """Return each training step's memory of one rank."""
    model, train = plan.tables.model, plan.tables.train
    widths = row_widths(plan.tables, plan.counts)
    return {s: training_memory(Training(plan.shape, model, train, plan.ranks, w)) for s, w in widths.items()}


def worker_memory(plan: Plan) -> Memory:
    """Return the memory of one generation worker, for the longest prompts and answers."""
    tables, counts = plan.tables, plan.counts
    new_tokens = max(tables.sample.max_new_tokens, tables.eval.max_new_tokens)
    prompt = max(1, counts.longest_tokens - counts.answer_tokens)
    share = plan.worker_gpus * plan.gpu_bytes
    return generation_memory(plan.shape, tables.generation, share, prompt, new_tokens)


def training_fits(plan: Plan) -> bool:
    """Return whether both training steps fit the GPUs."""
    return max(memory.total_bytes for memory in training_memories(plan).values()) <= plan.gpu_bytes


def generation_fits(plan: Plan) -> bool:
    """Return whether all workers find a GPU, or a part, that they fit."""
    workers = max(1, plan.tables.generation.workers)
    enough = workers * plan.worker_gpus <= plan.options.gpus
    share = plan.worker_gpus * plan.gpu_bytes
    return enough and worker_memory(plan).total_bytes <= share + 1  # a byte for rounding


def changed(plan: Plan, changes: Changes) -> Plan:
    """Return the plan with settings (`table.key`) and numbers of the machine (`ranks`) changed."""
    tables = plan.tables
    for key, value in changes.items():
        if key == "ranks":
            plan = dataclasses.replace(plan, options=dataclasses.replace(plan.options, gpus=value, ranks=value))
            continue
        table, _, name = key.partition(".")
        old = getattr(tables, table)
        if name == "lora.enabled":
            name, value = "lora", old.lora.model_copy(update={"enabled": value})
        tables = dataclasses.replace(tables, **{table: old.model_copy(update={name: value})})
    plan = dataclasses.replace(plan, tables=tables)
    if "generation.batch_tokens" in changes:
        return dataclasses.replace(plan, automatic_tokens=False)
    return _with_automatic_tokens(plan) if plan.automatic_tokens else plan


def words_of(changes: Changes) -> str:
    """Return changes as words of the command."""
    words = []
    for key, value in changes.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words.append(f"--gpus {text} --ranks {text}" if key == "ranks" else f"{key}={text}")
    return " ".join(words)


def _halves(number: int, least: int) -> Iterator[int]:
    while number // 2 >= max(MIN_TOKENS, least):
        number //= 2
        yield number


def _checkpointing(plan: Plan) -> list[Changes]:
    done = plan.tables.train.gradient_checkpointing
    return [] if done else [{"train.gradient_checkpointing": True}]


def _smaller(plan: Plan) -> list[Changes]:
    least = max(row_widths(plan.tables, plan.counts).values())
    sizes = _halves(plan.tables.train.micro_batch_tokens, least)
    return [{"train.micro_batch_tokens": tokens} for tokens in sizes]


def _stages(plan: Plan) -> list[Changes]:
    return [{"train.zero_stage": stage} for stage in range(plan.tables.train.zero_stage + 1, 4)]


def _more_ranks(plan: Plan) -> list[Changes]:
    if plan.tables.train.zero_stage == 0:
        return []
    sizes = (plan.ranks << power for power in range(1, 11))
    return [{"ranks": ranks} for ranks in sizes if ranks <= MAX_RANKS]


def _lora(plan: Plan) -> list[Changes]:
    return [] if plan.tables.model.lora.enabled else [{"model.lora.enabled": True}]


def _offload(plan: Plan) -> list[Changes]:
    train = plan.tables.train
    first: Changes = {} if train.zero_stage else {"train.zero_stage": 2}
    if not train.offload_optimizer:
        first["train.offload_optimizer"] = True
    both = first | ({} if train.zero_stage == 3 else {"train.zero_stage": 3}) | {"train.offload_parameters": True}
    return ([first] if first else []) + ([] if train.offload_parameters else [both])


def _precision(plan: Plan) -> list[Changes]:
    return [{"train.precision": "bfloat16"}] if plan.tables.train.precision == "float32" else []


# What is tried, in this order; each gives its changes from the smallest on.
_WAYS: tuple[Callable[[Plan], list[Changes]], ...] = (
    _checkpointing,
    _smaller,
    _stages,
    _more_ranks,
    _lora,
    _offload,
    _precision,
)


def smallest_change(plan: Plan) -> Changes | None:
    """Return the first change, in the order of _WAYS, that alone makes training fit; else several; None: none does.

    Of several those that turn out not to be needed are left out again, from the last on.
    """
    for way in _WAYS:
        if found := next((changes for changes in way(plan) if training_fits(changed(plan, changes))), None):
            return _needed(plan, found)
    taken: Changes = {}
    for way in _WAYS:
        options = way(changed(plan, taken))
        found = next((changes for changes in options if training_fits(changed(plan, taken | changes))), None)
        if found:
            return _needed(plan, taken | found)
        if options and way is not _more_ranks:  # ranks that don't help enough are not asked for
            taken |= options[-1]
    return None


def _needed(plan: Plan, changes: Changes) -> Changes:
    """Return the changes without those that are not needed, and the largest micro-batch that they allow."""
    for key in [*reversed(changes), "train.zero_stage"]:  # once more, when what needs the stage is left out
        fewer = {name: value for name, value in changes.items() if name != key}
        offloads = any(name.startswith("train.offload") for name in fewer)  # which only some stages can do
        if fewer and not (offloads and key == "train.zero_stage") and training_fits(changed(plan, fewer)):
            changes = fewer
    size = "train.micro_batch_tokens"
    if size in changes:
        larger = (changes | smaller for smaller in _smaller(plan))
        changes = next((one for one in larger if training_fits(changed(plan, one))), changes)
    return changes


def complaint_of_plan(plan: Plan) -> str | None:
    """Return why the plan can't be carried out and the smallest changes with which it can, or None."""
    said = []
    if not training_fits(plan):
        stage, memory = max(training_memories(plan).items(), key=lambda item: item[1].total_bytes)
        needs = f"{stage} needs {memory.total_bytes / GB:.1f} GB a GPU, which has {plan.gpu_bytes / GB:.1f}"
        change = smallest_change(plan)
        if change is None:
            way = "use a smaller model or GPUs with more memory (--gpu-memory)"
            return f"{needs}, and no setting tried here makes it fit; {way}"
        peak = max(m.total_bytes for m in training_memories(changed(plan, change)).values()) / GB
        said.append(f"{needs}; it fits with {words_of(change)} ({peak:.1f} GB)")
        plan = changed(plan, change)
    if not generation_fits(plan):
        said.append(_generation_complaint(plan))
    return "; and ".join(said) or None


def _generation_complaint(plan: Plan) -> str:
    generation = plan.tables.generation
    workers, share = max(1, generation.workers), plan.worker_gpus * plan.gpu_bytes
    needs = (
        f"a generation worker needs {worker_memory(plan).total_bytes / GB:.1f} GB of the {share / GB:.1f} that it has"
    )
    if workers * plan.worker_gpus > plan.options.gpus:
        needs = f"{workers} workers of {plan.worker_gpus:g} GPUs are more than the {plan.options.gpus} GPUs there are"
    for change in generation_changes(plan):
        if generation_fits(changed(plan, change)):
            return f"{needs}; it fits with {words_of(change)}"
    more = " or more of them (--gpus)" if plan.options.gpus < max(WORKER_GPUS) else ""
    way = f"use GPUs with more memory (--gpu-memory){more}"
    return f"{needs}, and no setting tried here makes it fit: a worker uses GPUs of one node; {way}"


def generation_changes(plan: Plan) -> Iterator[Changes]:
    """Yield what is tried for the workers, from the smallest change on.

    For each number of GPUs a worker, which are the present one, fewer, more: as many workers as there are GPUs for, the
    batch as it is and then halved. All of it again in bfloat16 where it was float32.
    """
    generation, present = plan.tables.generation, plan.worker_gpus
    node = plan.tables.slurm.gpus_per_node or max(WORKER_GPUS)
    others = sorted({*WORKER_GPUS} - {present}, key=lambda gpus: (gpus > present, abs(gpus - present)))
    dtypes: list[Changes] = [{}] + ([{"generation.dtype": "bfloat16"}] if generation.dtype == "float32" else [])
    for dtype in dtypes:
        for gpus in (present, *(gpus for gpus in others if gpus <= node)):
            room = int(plan.options.gpus / gpus)
            change = dtype | ({} if gpus == present else {"generation.gpus_per_worker": gpus})
            change |= {"generation.workers": room} if room < generation.workers else {}
            if not room:
                continue
            yield change
            tokens = changed(plan, change).tables.generation.batch_tokens
            for fewer in _halves(tokens, plan.counts.longest_tokens) if generation.engine == "transformers" else ():
                yield change | {"generation.batch_tokens": fewer}
