"""The plan of a run before anything runs: whether it fits a machine, and the smallest change that makes it fit.

The formulas of training are in training_memory and workload, those of a worker in models/worker_memory, the models in
models/shape, the options in machine. Here they meet. Starts nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from coalign.config import Config
from coalign.models.shape import Shape, count_lora_parameters, count_parameters
from coalign.models.worker_memory import CONTEXT_BYTES, GB, Memory, element_bytes, generation_memory, tokens_in_flight
from coalign.planning.data_counts import Assumed, Counts, make_counts
from coalign.planning.machine import MachineOptions, find_gpus, find_model
from coalign.planning.training_memory import TrainingSetup, training_memory
from coalign.planning.workload import row_widths
from coalign.runs.run_folder import RunFolder

MAX_RANKS = 1024  # no more are proposed
MIN_TOKENS = 128  # no smaller micro-batch or batch is proposed
WORKER_GPUS = (1.0, 2.0, 4.0, 8.0)  # per worker; all on one node

Changes = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A configuration, the model's shape and its source, the amount of data, the machine and the source of its GPUs."""

    config: Config
    shape: Shape
    source: str
    counts: Counts
    options: MachineOptions
    gpus_source: str = ""
    automatic_tokens: bool = False  # generation.batch_tokens was 0 and is what a worker would choose

    @property
    def ranks(self) -> int:
        """Return the number of training ranks."""
        return self.options.ranks or self.options.gpus

    @property
    def gpu_bytes(self) -> float:
        """Return the memory per GPU, in bytes."""
        return self.options.gpu_memory * GB

    @property
    def worker_gpus(self) -> float:
        """Return the GPUs per generation worker; 0 and -1 in the config mean one here."""
        wanted = self.config.generation.gpus_per_worker
        return wanted if wanted > 0 else 1.0


def make_plan(config: Config, options: MachineOptions) -> Plan:
    """Return the plan of a configuration. Raises UserError when the model's shape is unknown or options contradict."""
    model = config.model
    shape, source = find_model(model, options)
    context = min(shape.context, model.max_tokens or shape.context)
    assumed = Assumed(options.tasks, options.inputs, options.prompt_tokens, options.answer_tokens)
    counts = make_counts(RunFolder(config.run, []).step("prepare"), config.data, assumed, context)
    if model.lora.enabled:
        count_lora_parameters(shape, model.lora)  # raises UserError for a target module that the model lacks
    plan = Plan(config, shape, source, counts, *find_gpus(options, config.slurm, config.train))
    return plan if config.generation.batch_tokens else _with_automatic_tokens(plan)


def _with_automatic_tokens(plan: Plan) -> Plan:
    """Return the plan with the generation.batch_tokens that a worker chooses where it is 0."""
    dtype = plan.config.generation.dtype
    free = plan.worker_gpus * plan.gpu_bytes - element_bytes(dtype) * count_parameters(plan.shape) - CONTEXT_BYTES
    plan = changed(plan, {"generation.batch_tokens": tokens_in_flight(plan.shape, dtype, free)})
    return dataclasses.replace(plan, automatic_tokens=True)


def training_memories(plan: Plan) -> dict[str, Memory]:
    """Return {training step: memory of one rank}."""
    model, train = plan.config.model, plan.config.train
    widths = row_widths(plan.config, plan.counts)
    return {s: training_memory(TrainingSetup(plan.shape, model, train, plan.ranks, w)) for s, w in widths.items()}


def worker_memory(plan: Plan) -> Memory:
    """Return the memory of one generation worker, for the longest prompts and answers."""
    config, counts = plan.config, plan.counts
    new_tokens = config.model.answer_tokens(max(config.sample.max_new_tokens, config.eval.max_new_tokens))
    prompt = max(1, counts.longest_tokens - counts.answer_tokens)
    share = plan.worker_gpus * plan.gpu_bytes
    return generation_memory(plan.shape, config.generation, share, prompt, new_tokens)


def training_fits(plan: Plan) -> bool:
    """Return whether both training steps fit on the GPUs."""
    return max(memory.total_bytes for memory in training_memories(plan).values()) <= plan.gpu_bytes


def generation_fits(plan: Plan) -> bool:
    """Return whether there are GPUs for all workers, or shares of them, on which each fits."""
    workers = max(1, plan.config.generation.workers)
    enough = workers * plan.worker_gpus <= plan.options.gpus
    share = plan.worker_gpus * plan.gpu_bytes
    return enough and worker_memory(plan).total_bytes <= share + 1  # a byte for rounding


def changed(plan: Plan, changes: Changes) -> Plan:
    """Return the plan with settings (`table.key`) changed; `ranks` changes the GPUs and ranks of the machine."""
    config = plan.config
    for key, value in changes.items():
        if key == "ranks":
            plan = dataclasses.replace(plan, options=dataclasses.replace(plan.options, gpus=value, ranks=value))
            continue
        table, _, name = key.partition(".")
        old = getattr(config, table)
        if name == "lora.enabled":
            name, value = "lora", old.lora.model_copy(update={"enabled": value})
        config = config.model_copy(update={table: old.model_copy(update={name: value})})
    plan = dataclasses.replace(plan, config=config)
    if "generation.batch_tokens" in changes:
        return dataclasses.replace(plan, automatic_tokens=False)
    return _with_automatic_tokens(plan) if plan.automatic_tokens else plan


def words_of(changes: Changes) -> str:
    """Return changes as words of launch/plan.py's command line."""
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
    done = plan.config.train.gradient_checkpointing
    return [] if done else [{"train.gradient_checkpointing": True}]


def _smaller(plan: Plan) -> list[Changes]:
    least = max(row_widths(plan.config, plan.counts).values())
    sizes = _halves(plan.config.train.micro_batch_tokens, least)
    return [{"train.micro_batch_tokens": tokens} for tokens in sizes]


def _stages(plan: Plan) -> list[Changes]:
    return [{"train.zero_stage": stage} for stage in range(plan.config.train.zero_stage + 1, 4)]


def _more_ranks(plan: Plan) -> list[Changes]:
    if plan.config.train.zero_stage == 0:
        return []
    sizes = (plan.ranks << power for power in range(1, 11))
    return [{"ranks": ranks} for ranks in sizes if ranks <= MAX_RANKS]


def _lora(plan: Plan) -> list[Changes]:
    return [] if plan.config.model.lora.enabled else [{"model.lora.enabled": True}]


def _offload(plan: Plan) -> list[Changes]:
    train = plan.config.train
    first: Changes = {} if train.zero_stage else {"train.zero_stage": 2}
    if not train.offload_optimizer:
        first["train.offload_optimizer"] = True
    both = first | ({} if train.zero_stage == 3 else {"train.zero_stage": 3}) | {"train.offload_parameters": True}
    return ([first] if first else []) + ([] if train.offload_parameters else [both])


def _precision(plan: Plan) -> list[Changes]:
    return [{"train.precision": "bfloat16"}] if plan.config.train.precision == "float32" else []


# What is tried, in this order. Each function returns its changes, the smallest first.
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
    """Return the first change, in the order of _WAYS, that makes training fit by itself; else several; else None.

    Of several changes, those that turn out not to be needed are left out again, the last one first.
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
    """Return only the changes that are needed, with the largest micro-batch that they allow."""
    for key in [*reversed(changes), "train.zero_stage"]:  # again, now that what needs the stage may be left out
        fewer = {name: value for name, value in changes.items() if name != key}
        offloads = any(name.startswith("train.offload") for name in fewer)  # which needs the stage
        if fewer and not (offloads and key == "train.zero_stage") and training_fits(changed(plan, fewer)):
            changes = fewer
    size = "train.micro_batch_tokens"
    if size in changes:
        larger = (changes | smaller for smaller in _smaller(plan))
        changes = next((one for one in larger if training_fits(changed(plan, one))), changes)
    return changes


def complaint_of_plan(plan: Plan) -> str | None:
    """Return why the plan can't be carried out and the smallest changes with which it can; None when it can."""
    said = []
    if not training_fits(plan):
        stage, memory = max(training_memories(plan).items(), key=lambda item: item[1].total_bytes)
        needs = f"{stage} needs {memory.total_bytes / GB:.1f} GB per GPU, which has {plan.gpu_bytes / GB:.1f}"
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
    generation = plan.config.generation
    workers, share = max(1, generation.workers), plan.worker_gpus * plan.gpu_bytes
    needs = f"a generation worker needs {worker_memory(plan).total_bytes / GB:.1f} GB and has {share / GB:.1f}"
    if workers * plan.worker_gpus > plan.options.gpus:
        needs = f"{workers} workers x {plan.worker_gpus:g} GPUs are more than the {plan.options.gpus} GPUs there are"
    for change in generation_changes(plan):
        if generation_fits(changed(plan, change)):
            return f"{needs}; it fits with {words_of(change)}"
    more = " or more of them (--gpus)" if plan.options.gpus < max(WORKER_GPUS) else ""
    way = f"use GPUs with more memory (--gpu-memory){more}"
    return f"{needs}, and no setting tried here makes it fit: a worker uses GPUs of one node; {way}"


def generation_changes(plan: Plan) -> Iterator[Changes]:
    """Yield the changes that are tried for the workers, the smallest first.

    The GPUs per worker are as now, then fewer, then more. For each number there are as many workers as fit, and the
    batch is as now, then halved again and again. All of it is repeated in bfloat16 where the dtype was float32.
    """
    generation, present = plan.config.generation, plan.worker_gpus
    node = plan.config.slurm.gpus_per_node or max(WORKER_GPUS)
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
            tokens = changed(plan, change).config.generation.batch_tokens
            for fewer in _halves(tokens, plan.counts.longest_tokens) if generation.engine == "transformers" else ():
                yield change | {"generation.batch_tokens": fewer}
