"""Rows about several processes: Ray workers against bare processes, and two training ranks against one."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lengths import lengths
from benchmarks.networks import SMALL, TINY, Shape, make_folder, random_ids
from benchmarks.rows import Row, Side, reported
from coalign.clusters import worker_pool
from coalign.config import GenerationTable, ModelTable
from coalign.generation.transformers_worker import GenerateWorker, Sampling

WORKERS = 2
WORK_SECONDS = 60.0  # of the timed part, about
SAMPLES, NEW_TOKENS = 4, 24  # as in configs/sni-mini.toml
BATCH_TOKENS = 16384  # of a training update, at least
UPDATES = 3

Rows = list[dict[str, Any]]
Shards = list[tuple[int, Rows]]


@functools.cache
def worker_of(folder: str) -> GenerateWorker:
    """Return this process's worker, which it makes once."""
    return GenerateWorker(folder, ModelTable(), GenerationTable(), Sampling(NEW_TOKENS, 1.0), 1)


def start_process(folder: str, ready: Any) -> None:
    """Make a bare process's worker and wait until the other processes have theirs."""
    worker_of(folder)
    ready.wait()


def work_off(folder: str, shard: tuple[int, Rows]) -> tuple[int, Rows]:
    """Answer one shard in a bare process."""
    return shard[0], worker_of(folder)(shard[1])


def make_shards(count: int, size: int, shape: Shape) -> Shards:
    """Return shards of prompts to sample."""
    source = random.Random(0)
    tasks = lengths()["tasks"]
    numbers = iter(range(count * size * SAMPLES))

    def request() -> dict[str, Any]:
        prompt = random_ids(source, source.choice(source.choice(tasks)["prompt"]), shape)
        return {"prompt_ids": prompt, "seeds": [next(numbers) for _ in range(SAMPLES)]}

    return [(index, [request() for _ in range(size)]) for index in range(count)]


def timed(run: Callable[[Shards], Any], warm: Shards, shards: Shards) -> dict[str, Any]:
    """Return the wall seconds of the shards, after others by which every process has started and has its model."""
    list(run(warm))
    start = time.monotonic()
    results = dict(run(shards))
    return {"seconds": time.monotonic() - start, "results": results}


def by_processes(folder: str, warm: Shards, shards: Shards) -> dict[str, Any]:
    """Work the shards off with bare processes, each taking the next one when it is free."""
    context = multiprocessing.get_context("spawn")
    ready = (folder, context.Barrier(WORKERS))
    with concurrent.futures.ProcessPoolExecutor(WORKERS, context, start_process, ready) as executor:
        return timed(lambda some: executor.map(functools.partial(work_off, folder), some), warm, shards)


def by_ray(folder: str, warm: Shards, shards: Shards) -> dict[str, Any]:
    """Work the shards off with Ray workers, on a private cluster that ends with them."""
    settings = GenerationTable(workers=WORKERS)
    make_worker = functools.partial(worker_of, folder)
    try:
        return timed(lambda some: worker_pool.map_shards(make_worker, some, settings, "bench"), warm, shards)
    finally:
        for started in worker_pool._pools.values():
            started.close()
        worker_pool._pools.clear()


def seconds_of(folder: str, shards: Shards) -> float:
    """Return the seconds that a shard takes in this process when it runs for the second time."""
    work_off(folder, shards[0])
    start = time.monotonic()
    work_off(folder, shards[0])
    return time.monotonic() - start


def ray_rows(tiny: bool) -> list[Row]:
    """Return sampling by Ray workers against bare processes, on shards as the pipeline cuts them."""
    shape, size = (TINY, 2) if tiny else (SMALL, GenerationTable().shard_size)
    keep = tempfile.TemporaryDirectory()
    folder = str(make_folder(Path(keep.name), shape))
    warm = make_shards(2 * WORKERS, 2, shape)
    count = 4
    if not tiny:
        count = WORKERS * max(2, round(WORK_SECONDS / seconds_of(folder, make_shards(1, size, shape))))
    shards = make_shards(count, size, shape)

    def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return bool(keep.name and a["results"] == b["results"])  # the folder lives as long as its row

    return [
        Row(
            f"{WORKERS} Ray workers, {count} shards of {size} prompts, {shape.name}",
            f"{WORKERS} bare processes, after start-up",
            0.95,
            Side(lambda: by_ray(folder, warm, shards)),
            Side(lambda: by_processes(folder, warm, shards)),
            same,
            unit="s",
            measure=reported("seconds"),
            warm_up=False,
        )
    ]


def free_port() -> str:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def train_ranks(num_ranks: int, shape: Shape, tokens: int, updates: int) -> dict[str, Any]:
    """Train with DeepSpeed ranks of one thread and return the wall seconds of the updates and their losses."""
    script = Path(__file__).with_name("rank_updates.py")
    with tempfile.TemporaryDirectory() as place:
        make_folder(Path(place), shape)
        spec = {"folder": place, "shape": dataclasses.asdict(shape), "tokens": tokens, "updates": updates}
        (Path(place) / "spec.json").write_text(json.dumps(spec))
        command = ["deepspeed", "--num_gpus", str(num_ranks), "--master_port", free_port(), "--log_level", "warning"]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
        command += [str(script), f"{place}/spec.json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{num_ranks} ranks failed:\n{(done.stdout + done.stderr)[-4000:]}")
        found: dict[str, Any] = json.loads((Path(place) / "found.json").read_text())
        return found


def rank_rows(tiny: bool) -> list[Row]:
    """Return the same updates by one rank and by two."""
    shape, tokens, updates = (TINY, 1000, 1) if tiny else (SMALL, BATCH_TOKENS, UPDATES)

    def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return all(abs(x - y) < 1e-4 for x, y in zip(a["losses"], b["losses"], strict=True))

    return [
        Row(
            f"2 ranks of one thread, SFT updates of {tokens} tokens, {shape.name}",
            "1 rank of one thread",
            1.7,
            Side(lambda: train_ranks(2, shape, tokens, updates)),
            Side(lambda: train_ranks(1, shape, tokens, updates)),
            same,
            unit="s",
            measure=reported("seconds"),
            warm_up=False,
            max_repeats=2,
        )
    ]


BUILDERS: dict[str, Callable[[bool], list[Row]]] = {"ray": ray_rows, "ranks": rank_rows}
