"""A plan written down: tables of memory, work and hours, what was assumed; and the sizing table of docs/planning.md.

Formats the numbers of plan, training_memory and workload. Knows no formula but that of hours.
"""

from __future__ import annotations

from collections.abc import Sequence

from coalign.config import LoraTable, ModelTable, TrainTable
from coalign.models.known_shapes import KNOWN
from coalign.models.shape import Shape, count_lora_parameters, count_parameters
from coalign.models.worker_memory import GB, Memory
from coalign.planning.data_counts import CHARACTERS_PER_TOKEN
from coalign.planning.plan import Plan, training_memories, worker_memory
from coalign.planning.training_memory import TrainingSetup, training_memory
from coalign.planning.workload import Work, works
from coalign.steps import TRAINING_STEPS

TABLE_MODELS = ("1b", "4b", "7b", "8b", "13b", "32b", "70b")
TABLE_METHODS = {"full": ModelTable(), "LoRA": ModelTable(lora=LoraTable(enabled=True))}
TABLE_GPUS = (1, 2, 4, 8, 16, 32, 64)
TABLE_GPU_BYTES = 80 * GB
TABLE_TOKENS = 8192
TABLE_ROW_TOKENS = 2048


def hours(plan: Plan, work: Work) -> float:
    """Return the hours of a step: FLOPs / (GPUs x peak x share of the peak), reading and generating tokens apart."""
    options, generation = plan.options, plan.config.generation
    gpus = float(plan.ranks) if work.step in TRAINING_STEPS else max(1, generation.workers) * plan.worker_gpus
    peak = gpus * options.gpu_tflops * 1e12
    return (work.read_flops / options.mfu + work.new_flops / options.generation_mfu) / peak / 3600


def plan_lines(plan: Plan) -> list[str]:
    """Return the plan for people."""
    done = works(plan.config, plan.shape, plan.counts)
    return [
        *_head(plan),
        "",
        *_training_lines(plan),
        "",
        *_memory_lines("generation, GB per worker", {"": worker_memory(plan)}),
        "",
        *_work_lines(plan, done),
        "",
        *_assumptions(plan),
    ]


def _head(plan: Plan) -> list[str]:
    shape, model, train, options = plan.shape, plan.config.model, plan.config.train, plan.options
    rank = model.lora.rank
    lora = f"LoRA of rank {rank}, {count_lora_parameters(shape, model.lora) / 1e6:.1f}M trained"
    method = lora if model.lora.enabled else "full fine-tuning"
    offload = [name for name in ("optimizer", "parameters") if getattr(train, f"offload_{name}")]
    parts = [method, f"ZeRO {train.zero_stage}", *(f"offloaded {name}" for name in offload)]
    parts += ["gradient checkpointing"] if train.gradient_checkpointing else []
    precision = "float32" if train.precision == "float32" else "bfloat16"
    return [
        "From formulas, for the GPUs named here; nothing was measured on this machine. GB are 10^9 bytes.",
        f"model    {shape.name}: {count_parameters(shape) / 1e9:.3f}B parameters, {shape.num_layers} layers,"
        f" hidden {shape.hidden}, vocabulary {shape.vocabulary} (from {plan.source})",
        f"machine  {options.gpus} GPU{'s' if options.gpus != 1 else ''} of {options.gpu_memory:g} GB and"
        f" {options.gpu_tflops:g} TFLOP/s, {plan.ranks} rank{'s' if plan.ranks != 1 else ''}",
        f"training {', '.join([*parts, precision])}, {train.micro_batch_tokens} tokens per micro-batch",
    ]


def _training_lines(plan: Plan) -> list[str]:
    memories = training_memories(plan)
    host = max(memory.host_bytes for memory in memories.values()) / GB
    lines = _memory_lines("training, GB per GPU", memories)
    return [*lines, f"  host memory of rank 0, which writes and checks the model: {host:.1f} GB"]


def _memory_lines(title: str, memories: dict[str, Memory]) -> list[str]:
    """Return one line per part and one column per memory, with the last one's formula."""
    lines = [f"{title:26}" + "".join(f"{name:>9}" for name in memories)]
    for index, part in enumerate(next(iter(memories.values())).parts):
        numbers = "".join(f"{memory.parts[index].num_bytes / GB:9.2f}" for memory in memories.values())
        formula = list(memories.values())[-1].parts[index].formula
        lines.append(f"  {part.name:24}{numbers}   {formula}")
    totals = "".join(f"{memory.total_bytes / GB:9.2f}" for memory in memories.values())
    return [*lines, f"  {'peak':24}{totals}"]


def _work_lines(plan: Plan, done: Sequence[Work]) -> list[str]:
    lines = [f"{'step':11}{'Mtokens read':>13}{'new':>9}{'PFLOP':>12}{'hours':>9}{'disk GB':>9}   what"]
    for work in done:
        flops = (work.read_flops + work.new_flops) / 1e15
        lines.append(
            f"{work.step:11}{work.tokens / 1e6:13.3f}{work.new_tokens / 1e6:9.3f}{flops:12.3f}"
            f"{hours(plan, work):9.3f}{work.disk_bytes / GB:9.3f}   {work.what}"
        )
    total_hours, total_bytes = sum(hours(plan, work) for work in done), sum(work.disk_bytes for work in done)
    return [*lines, f"{'together':11}{'':34}{total_hours:9.3f}{total_bytes / GB:9.3f}"]


def _assumptions(plan: Plan) -> list[str]:
    options = plan.options
    slow = "float32" in (plan.config.train.precision, plan.config.generation.dtype)
    lines = [
        *([plan.gpus_source] if plan.gpus_source else []),
        *plan.counts.assumptions,
        *(["the same peak in float32, where GPUs are slower: give --gpu-tflops"] if slow else []),
        f"{options.mfu:.0%} of the peak in training and in reading prompts (--mfu), {options.generation_mfu:.0%} in"
        " generating tokens (--generation-mfu)",
        "responses as long as gold answers, no two alike; every rewrite tried; groups of the largest size",
        f"text on disk of {CHARACTERS_PER_TOKEN} bytes per token; the peak of disk use, while a checkpoint is written",
        "hours of computing alone (0.000: below 2 seconds), without starting, loading, a slow network or an"
        " optimizer on the host",
    ]
    return ["assumed:", *(f"  - {line}" for line in lines)]


def sizing_lines() -> list[str]:
    """Return the sizing table as Markdown: the fewest GPUs on which a training step fits, and the GB used per GPU."""
    lines = ["| model | method | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3 |", "|---|---|---|---|---|---|"]
    for name in TABLE_MODELS:
        shape = KNOWN[name][0]
        for method, model in TABLE_METHODS.items():
            cells = [_fewest(shape, model, stage) for stage in range(4)]
            lines.append(f"| {shape.name} | {method} | {' | '.join(cells)} |")
    return lines


def _fewest(shape: Shape, model: ModelTable, stage: int) -> str:
    settings = {"zero_stage": stage, "gradient_checkpointing": True, "micro_batch_tokens": TABLE_TOKENS}
    train = TrainTable.model_validate(settings)
    for gpus in TABLE_GPUS:
        needed = training_memory(TrainingSetup(shape, model, train, gpus, TABLE_ROW_TOKENS)).total_bytes
        if needed <= TABLE_GPU_BYTES:
            return f"{gpus} x {needed / GB:.0f} GB"
    return "-"
