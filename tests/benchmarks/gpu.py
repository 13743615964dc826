"""Measure coalign on one GPU: Llamas of 0.5B and 7B parameters with random weights in bfloat16, against the plain way.

`python tests/benchmarks/gpu.py`; docs/benchmarks.md explains the tables. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import multiprocessing
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed"))

from benchmarks import generation_rows, training_rows
from benchmarks.bench import machine
from benchmarks.logprob_rows import Head
from benchmarks.networks import HALF, PAD, SEVEN, STOP, TINY, Codec, Shape, make_network, random_ids
from benchmarks.rows import HEADER, Row, Side, Work, measure_row, table_line
from benchmarks.training_rows import (
    LIMIT,
    GradientEngine,
    Update,
    align_row,
    align_sides,
    at_once,
    fill_micro_batch,
    packing_rows,
    ranking_row,
)
from benchmarks.workloads import even_groups, judge_requests, real_groups, sft_items
from coalign.config import LoraTable, ModelTable, TrainTable
from coalign.generation.decoding import decode
from coalign.generation.sampling import Sampling
from coalign.models import attention
from coalign.models.known_shapes import find_shape
from coalign.models.model_folder import without_planned_attention
from coalign.planning.training_memory import TrainingSetup, training_memory
from coalign.training.engine import Engine
from coalign.training.loop import _update
from coalign.training.losses import RankingForm
from coalign.training.micro_batches import Item
from coalign.training.objectives import Objective, align_objective, sft_objective

SHAPES = {shape.name: shape for shape in (HALF, SEVEN, TINY)}  # the last only to see that every line is measured
DEVICE, DTYPE = "cuda", torch.bfloat16
POSITIONS = 8192  # of the head alone
PEAK_FLOPS = 989e12  # dense bfloat16 of an H100 or H200 (SXM), a second
FULL_GIB = 18  # of memory a billion parameters: full training holds 16 bytes of each, and activations
RANKS_TOKENS = 16384  # of an update of the engines
ROW_TOKENS = 256  # of a row of theirs, about
BATCH_TOKENS = 65536  # generation.batch_tokens of the configs for 7B models
Figures = dict[str, Any]


def cuda_seconds(work: Work) -> tuple[float, Any]:
    """Return the wall seconds until the device has finished, and the result."""
    torch.cuda.synchronize()
    start = time.monotonic()
    result = work()
    torch.cuda.synchronize()
    return time.monotonic() - start, result


def cuda_mebibytes(work: Work) -> tuple[float, Any]:
    """Return the most memory that the work's tensors held at one time above what there was before, and the result."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20, result


def on_gpu(row: Row, same: Callable[[Any, Any], bool] | None = None, memory: bool = False) -> Row:
    """Return a row as it is measured on a GPU, where bfloat16 may have an agreement of its own."""
    measure, unit = (cuda_mebibytes, "MiB") if memory else (cuda_seconds, "s")
    return dataclasses.replace(row, measure=measure, unit=unit, same=same or row.same, max_repeats=100)


def alike(a: Update, b: Update) -> bool:
    """Return whether losses agree to 1 % and gradient norms to 5 %, which rounding to bfloat16 allows."""
    return abs(a["loss"] - b["loss"]) <= 0.01 * abs(a["loss"]) and abs(a["grad_norm"] / b["grad_norm"] - 1) <= 0.05


def alike_scores(a: list[list[float]], b: list[list[float]]) -> bool:
    """Return whether log-probs agree to 0.1 nats on average."""
    apart = [abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return sum(apart) < 0.1 * len(apart)


def visible_pairs(prompt: int, responses: Sequence[int]) -> int:
    """Return how many (query, key) pairs attention needs of a group; a response's last token is no input."""
    own = sum((n - 1) * prompt + (n - 1) * n // 2 for n in responses)
    return prompt * (prompt + 1) // 2 + own


def model_flops(shape: Shape, items: Sequence[Item], lora: bool) -> float:
    """Return the floating-point operations that an update needs, nothing recomputed.

    6 N a token for the layers' matrices (forward 2, backward 4; frozen ones need no gradient of their own: 4), as much
    a predicted token for the head, 12 L d a visible pair for attention (Chinchilla, arXiv 2203.15556, appendix F,
    counted over the pairs that a mask leaves).
    """
    d, passes = shape.hidden, 4 if lora else 6
    layer = 4 * d * d + 3 * d * shape.intermediate
    tokens = training_rows.num_tokens(items)
    predicted = sum(item.num_response_tokens for item in items)
    pairs = sum(visible_pairs(len(item.prompt), [len(r) for r in item.responses]) for item in items)
    matrices = passes * (shape.layers * layer * tokens + d * shape.vocabulary * predicted)
    return float(matrices + 12 * shape.layers * d * pairs)


def engine_on_gpu(shape: Shape) -> GradientEngine:
    """Return an engine that makes forward and backward passes and clips; AdamW of 7B parameters would not fit."""
    engine = GradientEngine(make_network(shape, DEVICE, DTYPE), training_rows.TABLE)
    engine.device = torch.device(DEVICE)
    attention.use_blocks(engine.model)
    for parameter in engine.trained:
        parameter.grad = torch.zeros_like(parameter)
    return engine


def by_masks(engine: GradientEngine, work: Work) -> Side:
    """Return work under dense masks (SDPA) in place of blocks (FlexAttention)."""

    def run() -> Any:
        attention.use_dense(engine.model)
        try:
            return work()
        finally:
            attention.use_blocks(engine.model)

    return Side(run)


def training_table(shape: Shape, count: int) -> Iterator[Row]:
    """Yield rows about updates of either stage."""
    engine = engine_on_gpu(shape)
    for what, groups in (("real groups", real_groups(count, shape)), ("K=8 P=132 R=6", even_groups(count, shape))):
        row = align_row(engine, shape, what, groups)
        yield on_gpu(row, alike)
        filled = fill_micro_batch(groups, LIMIT)
        plain, ours = (at_once(side) for side in align_sides(engine, filled))
        name, against = (
            f"align step, peak memory, {len(filled)} {what}, {shape.name}",
            "one micro-batch of 8,192 tokens",
        )
        yield on_gpu(Row(name, against, 1 / 3, ours, plain, alike, at_most=True), memory=True)
        name = f"FlexAttention, {row.name.partition(', token')[0]}"
        against = "the same rows under dense masks (SDPA)"
        masked = by_masks(engine, row.ours.work)
        yield on_gpu(dataclasses.replace(row, name=name, against=against, target=1.0, plain=masked), alike)
    for row in packing_rows(engine, shape, count):
        padded = row.against.startswith("padded")
        yield on_gpu(row, alike if padded else None)
    yield on_gpu(ranking_row(engine, shape, count))


def generation_table(shape: Shape, count: int) -> Iterator[Row]:
    """Yield rows about sampling and judging."""
    model = make_network(shape, DEVICE, DTYPE)
    yield on_gpu(
        generation_rows.judge_row(model, shape, judge_requests(max(2, count // 4), shape), BATCH_TOKENS), alike_scores
    )
    yield on_gpu(generation_rows.sampling_row(model, shape, 8, 200, BATCH_TOKENS))
    if shape is not SEVEN:  # where 128 steps of few rows take long, and show nothing else
        yield on_gpu(generation_rows.mixed_row(model, shape, count, 12 if shape is TINY else 128))


def logprob_table(shape: Shape, count: int) -> Iterator[Row]:
    """Yield rows about the head alone."""
    head = Head(shape, POSITIONS, False, DEVICE, DTYPE)
    name = f"log-probs, {POSITIONS} positions, vocabulary {shape.vocabulary}, {shape.name}"
    row = Row(name, "full log_softmax", 1.25, Side(head.ours), Side(head.plain), close_logps, at_most=True)
    yield on_gpu(row)
    yield on_gpu(dataclasses.replace(row, target=0.65), memory=True)


def close_logps(a: Any, b: Any) -> bool:
    """Return whether log-probs and both gradients agree within 5 % of their size."""
    return all(float((x - y).abs().max()) <= 0.05 * float(y.abs().max()) for x, y in zip(a, b, strict=True))


def timed_updates(
    engine: Engine, items: Sequence[Item], objective: Objective, table: TrainTable, updates: int
) -> tuple[float, float]:
    """Return the seconds of an update and the most memory held in them, in GiB; the first two warm up."""
    for _ in range(2):
        _update(engine, items, objective, PAD, table, 1e-6)
    torch.cuda.reset_peak_memory_stats()
    seconds = [cuda_seconds(lambda: _update(engine, items, objective, PAD, table, 1e-6))[0] for _ in range(updates)]
    return min(seconds), torch.cuda.max_memory_allocated() / 2**30


def first_of(items: Sequence[Item], tokens: int) -> list[Item]:
    """Return the fewest items that have the given number of tokens."""
    count = next(n for n in range(1, len(items) + 1) if training_rows.num_tokens(items[:n]) >= tokens)
    return list(items[:count])


def engine_figures(shape: Shape, folder: str, zero: int, lora: bool, checkpointing: bool) -> list[Figures]:
    """Return speed, MFU and memory of both stages by DeepSpeed, one rank, every step of training included."""
    from coalign.training.deepspeed_engine import DeepSpeedEngine, init_ranks

    without_planned_attention()
    found = []
    table = TrainTable(zero_stage=zero, gradient_checkpointing=checkpointing)
    model = ModelTable(path=folder, lora=LoraTable(enabled=lora))
    engine = DeepSpeedEngine(folder, model, table, init_ranks(), Path(folder) / "deepspeed.json")
    name = f"{shape.name}, {'LoRA' if lora else 'full'}, ZeRO {zero}{', checkpointing' if checkpointing else ''}"
    form = RankingForm()
    stages: list[tuple[str, list[Item], Objective]] = [
        ("sft", first_of(sft_items(1000, shape), RANKS_TOKENS), sft_objective()),
        ("align", first_of(real_groups(500, shape), RANKS_TOKENS), align_objective(form, shared_prefix=True)),
    ]
    for stage, items, objective in stages:
        seconds, peak = timed_updates(engine, items, objective, table, 3)
        tokens, flops = training_rows.num_tokens(items), model_flops(shape, items, lora)
        found.append(
            {
                "what": f"{stage}, {name}",
                "tokens_a_second": round(tokens / seconds),
                "mfu": round(flops / seconds / PEAK_FLOPS, 3),
                "peak_gib": round(peak, 1),
                "planned_gib": round(planned_gib(model, table), 1),
            }
        )
    return found


def planned_gib(model: ModelTable, table: TrainTable) -> float:
    """Return the memory that `launch/plan.py` foresees for a step, without its margin for CUDA and the allocator."""
    memory = training_memory(TrainingSetup(find_shape(model)[0], model, table, 1, ROW_TOKENS))
    margin = sum(part.num_bytes for part in memory.parts if part.name == "margin")
    return (memory.total_bytes - margin) / 2**30


def engine_table(shape: Shape, _count: int) -> Iterator[Figures]:
    """Yield figures of the engine's forms that fit the device, each in a process: DeepSpeed leaves memory taken."""
    room = torch.cuda.mem_get_info()[1] / 2**30
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        network = make_network(shape, DEVICE, DTYPE)
        size = sum(p.numel() for p in network.parameters()) / 1e9
        network.save_pretrained(place, max_shard_size="4GB")
        (Path(place) / "tokenizer_config.json").write_text("{}\n")  # which is not read here
        del network
        free()
        forms = [(3, True, False)] if size > 1 else [(0, False, False), (2, False, False)]
        if size * FULL_GIB < room:
            forms.append((3, False, size > 1))
        for form in forms:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                yield from process.submit(engine_figures, shape, place, *form).result()


def sampling_table(shape: Shape, count: int) -> Iterator[Figures]:
    """Yield generated tokens per second, on prompts that each have 8 samples of 32 tokens."""
    model, source = make_network(shape, DEVICE, DTYPE), random.Random(5)
    prompts = [random_ids(source, source.randint(100, 200), shape) for _ in range(count)]
    seeds = [[8 * n + k for k in range(8)] for n in range(len(prompts))]
    for budget in (8192, 65536):
        fixed = generation_rows.fixed_steps(model)
        work = functools.partial(decode, model, prompts, seeds, Sampling(32, 1.0), Codec(STOP), budget, fixed)
        work()
        torch.cuda.reset_peak_memory_stats()
        seconds, answers = cuda_seconds(work)
        drawn = sum(len(answer.ids) for group in answers for answer in group)
        yield {
            "what": f"sampling, {len(prompts)} prompts, K = 8, 32 new, batch_tokens {budget}, {shape.name}",
            "tokens_a_second": round(drawn / seconds),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        }


def free() -> None:
    """Give back what no tensor holds."""
    gc.collect()
    torch.cuda.empty_cache()


TABLES: dict[str, Callable[[Shape, int], Iterator[Row]]] = {
    "training": training_table,
    "logprobs": logprob_table,
    "generation": generation_table,
}
FIGURES: dict[str, Callable[[Shape, int], Iterator[Figures]]] = {"engine": engine_table, "sampling": sampling_table}


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TABLES, *FIGURES]
    parser.add_argument("--tables", nargs="+", default=names, choices=names, metavar="TABLE", help=", ".join(names))
    parser.add_argument("--shapes", nargs="+", default=[HALF.name, SEVEN.name], choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--groups", type=int, default=64, help="groups of an align step; others by it")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of both sides, of which the best counts")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing more after so long")
    parser.add_argument("--json", type=Path, default=Path("runs/bench-gpu.json"), help="file for the results")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure the tables of every shape, writing the file anew after each line."""
    options = parse(argv)
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device is here; `make bench` measures on a CPU")
    without_planned_attention()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    found: list[Figures] = []

    def keep(line: str, result: Figures) -> None:
        print(line, flush=True)
        found.append(result)
        content = {"gpu": torch.cuda.get_device_name(), **machine(), "rows": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    print(torch.cuda.get_device_name(), HEADER, sep="\n", flush=True)
    for shape in (SHAPES[name] for name in options.shapes):
        for table in options.tables:
            try:
                for line, result in measured(table, shape, options):
                    keep(line, result)
                    if time.monotonic() > end:
                        raise SystemExit(f"stopped after {options.seconds:g} s in {table} of {shape.name}")
            except Exception as error:  # the other tables are worth having
                traceback.print_exc()
                keep(f"{table}, {shape.name}: FAILED: {error}", {"row": f"{table}, {shape.name}", "error": str(error)})
            free()


def measured(table: str, shape: Shape, options: argparse.Namespace) -> Iterator[tuple[str, Figures]]:
    """Yield the lines of a table, and what they say as figures."""
    if table in FIGURES:
        for figures in FIGURES[table](shape, options.groups):
            yield figures_line(figures), figures
    else:
        for row in TABLES[table](shape, options.groups):
            result = measure_row(row, options.repeats)
            yield table_line(result), result


def figures_line(figures: Figures) -> str:
    """Return figures as a line."""
    mfu = f"  MFU {figures['mfu']:.1%}" if "mfu" in figures else ""
    planned = f" of {figures['planned_gib']} planned" if "planned_gib" in figures else ""
    speed = f"{figures['tokens_a_second']:>9,} tokens/s{mfu}"
    return f"{figures['what']:<80} {speed}  peak {figures['peak_gib']} GiB{planned}"


if __name__ == "__main__":
    main(sys.argv[1:])
