"""Shards over Ray actors: bounded in flight, retried, written by the driver alone.

Used by the generation recipes. Knows neither models nor what a row means. Without workers everything runs here.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from coalign.artifacts import StepFolder, write_rows
from coalign.cluster import Cluster
from coalign.config import GenerationTable
from coalign.errors import UserError
from coalign.process import out_of_memory
from coalign.records import read_rows

logger = logging.getLogger("coalign")

Row = dict[str, Any]
MAX_IN_FLIGHT = 2  # shards a worker: one at work, one waiting, so that no worker idles
MAX_RETRIES = 2  # a shard that fails 1 + MAX_RETRIES times fails the stage
END_SECONDS = 10.0  # that a killed actor may take to end


class Worker(Protocol):
    """Works off one shard: rows in, as many rows out, in order."""

    def __call__(self, rows: list[Row]) -> list[Row]: ...


class _Actor:
    """One process of the pool. It builds a call's worker with its first shard, so that an error reaches the driver."""

    def __init__(self, folder: str) -> None:
        # Relative paths in the settings mean the driver's folder, wherever the cluster was started.
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._call = -1
        self._worker: Worker | None = None

    def run(self, call: int, make_worker: Callable[[], Worker], rows: list[Row]) -> tuple[tuple[str, int], list[Row]]:
        """Return where this process is, and the results."""
        if call != self._call or self._worker is None:
            self._worker = None  # the old model goes before the new one comes
            gc.collect()
            self._worker, self._call = make_worker(), call
        return (platform.node(), os.getpid()), self._worker(rows)


class _Pool:
    """A connection to Ray and its actors, kept for the life of this process: starting them costs seconds."""

    def __init__(self, settings: GenerationTable) -> None:
        self.calls = 0
        self.seen: set[tuple[str, int]] = set()  # host and process of every actor that has returned something
        self.cluster = Cluster(settings.ray_address or os.environ.get("RAY_ADDRESS", ""), settings.workers)
        self.ray = self.cluster.ray
        atexit.register(self.close)
        options = _place(self.ray.cluster_resources(), settings)
        actor = self.ray.remote(max_restarts=-1, max_task_retries=MAX_RETRIES, **options)(_Actor)
        self.actors = [actor.remote(str(Path.cwd())) for _ in range(settings.workers)]
        where = "a private cluster" if self.cluster.is_private else self.cluster.address
        shown = f"{options['num_gpus']:g} GPU" if options["num_gpus"] else "1 CPU"
        logger.info("%d Ray workers on %s, each with %s", settings.workers, where, shown)

    def close(self) -> None:
        """Disconnect, which ends the actors; a private cluster ends."""
        atexit.unregister(self.close)
        self.cluster.close()
        # A step that follows at once must find their memory free, on the GPUs above all.
        here = [Path("/proc", str(process)) for host, process in self.seen if host == platform.node()]
        deadline = time.monotonic() + END_SECONDS
        while any(path.exists() for path in here) and time.monotonic() < deadline:
            time.sleep(0.02)


_pools: dict[tuple[int, float, str], _Pool] = {}


def _pool(settings: GenerationTable) -> _Pool:
    key = (settings.workers, settings.gpus_per_worker, settings.ray_address)
    if key not in _pools:
        for old in _pools.values():
            old.close()
        _pools.clear()
        _pools[key] = _Pool(settings)
    return _pools[key]


def map_shards(
    make_worker: Callable[[], Worker],
    shards: Sequence[tuple[int, list[Row]]],
    settings: GenerationTable,
    stage: str,
) -> Iterator[tuple[int, list[Row]]]:
    """Yield (shard index, results) as they are done, in any order.

    An actor that dies is replaced and its shards are tried again; a shard that fails three times raises RuntimeError
    with its index. A UserError inside a worker is raised here as itself.
    """
    if not shards:
        return
    if settings.workers == 0:
        worker = make_worker()
        for index, rows in shards:
            yield index, worker(rows)
        return
    pool = _pool(settings)
    pool.calls += 1
    waiting = list(reversed(shards))
    in_flight: dict[Any, tuple[int, Any]] = {}

    def submit(actor: Any) -> None:
        if waiting:
            index, rows = waiting.pop()
            with _full_store(pool.ray, index, stage):
                in_flight[actor.run.remote(pool.calls, make_worker, rows)] = (index, actor)

    for actor in pool.actors * MAX_IN_FLIGHT:
        submit(actor)
    while in_flight:
        ready, _ = pool.ray.wait(list(in_flight), num_returns=1)
        index, actor = in_flight.pop(ready[0])
        yield index, _result(pool, ready[0], index, stage)
        submit(actor)


def _result(pool: _Pool, reference: Any, index: int, stage: str) -> list[Row]:
    errors = pool.ray.exceptions
    rows: list[Row]
    try:
        with _full_store(pool.ray, index, stage):
            place, rows = pool.ray.get(reference)
        pool.seen.add(place)
        return rows
    except errors.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from None
        if type(cause).__name__ == "OutOfMemoryError":
            raise UserError(f"{stage}: {out_of_memory(cause)}") from None
        raise RuntimeError(f"{stage}: shard {index} failed: {cause!r}\n{error}") from None
    except errors.RayActorError as error:
        raise RuntimeError(
            f"{stage}: shard {index} (or one beside it) killed its worker {1 + MAX_RETRIES} times: {error}"
        ) from None


@contextlib.contextmanager
def _full_store(ray: Any, index: int, stage: str) -> Iterator[None]:
    """Turn what Ray raises when rows or results find no space into a UserError."""
    full = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)
    try:
        yield
    except (*full, ray.exceptions.RayTaskError) as error:
        if not isinstance(getattr(error, "cause", error), full):
            raise
        raise UserError(
            f"{stage}: no space in the Ray object store for shard {index}; use a smaller generation.shard_size, or"
            " free space in /dev/shm and /tmp; finished shards are kept"
        ) from None


def _place(have: dict[str, float], settings: GenerationTable) -> dict[str, Any]:
    """Return actor options after comparing what is asked with what the cluster has."""
    workers, gpus = settings.workers, settings.gpus_per_worker
    if gpus < 0:
        gpus = _share_of_gpus(have.get("GPU", 0.0), workers)
        if settings.engine == "vllm" and 0 < gpus < 1:  # each takes its part of the memory at once, so it must know it
            raise UserError(
                f'generation.workers={workers} would share {have["GPU"]:g} GPU; with generation.engine="vllm" use'
                f" generation.workers={math.floor(have['GPU'])}, or say generation.gpus_per_worker={gpus:g}"
            )
    need_gpus, have_gpus = gpus * workers, have.get("GPU", 0.0)
    if need_gpus > have_gpus:
        fitting = math.floor(have_gpus / gpus)
        raise UserError(
            f"generation.workers={workers} x gpus_per_worker={gpus:g} asks for {need_gpus:g} GPUs, the cluster has"
            f" {have_gpus:g}; use generation.workers={fitting} or fewer GPUs a worker"
        )
    if workers > have.get("CPU", 0):
        raise UserError(
            f"generation.workers={workers} asks for {workers} CPUs, the cluster has {have.get('CPU', 0):g};"
            " use fewer workers"
        )
    return {"num_cpus": 1, "num_gpus": gpus}


def _share_of_gpus(have: float, workers: int) -> float:
    """Return the GPUs a worker gets when the user leaves it to us: one, or an equal share of too few."""
    if have < 1:
        return 0.0
    if have >= workers:
        return 1.0
    return math.floor(100 * have / workers) / 100


def run_shards(
    step: StepFolder,
    requests: Sequence[Row],
    make_worker: Callable[[], Worker],
    settings: GenerationTable,
    title: str,
    name: str = "",
) -> Iterator[Row]:
    """Yield every request's result row in order, computing only the shards that are not on disk yet.

    Shards lie in the step's folder under `name`; the driver writes them, each atomically.
    """
    from tqdm import tqdm

    size = settings.shard_size
    folder = step.path / "shards"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}{'-' if name else ''}{i:05d}.jsonl" for i in range(math.ceil(len(requests) / size))]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    if len(missing) < len(paths):
        logger.info("%s: %d of %d shards are done already", title, len(paths) - len(missing), len(paths))
    shards = [(i, list(requests[i * size : (i + 1) * size])) for i in missing]
    interactive = sys.stderr.isatty()
    with tqdm(
        total=len(requests),
        initial=len(requests) - sum(len(rows) for _, rows in shards),
        desc=title,
        unit="prompt",
        mininterval=0.5 if interactive else 15.0,
        disable=not shards,
        dynamic_ncols=interactive,
    ) as bar:
        for index, results in map_shards(make_worker, shards, settings, title):
            assert len(results) == len(requests[index * size : (index + 1) * size])
            write_rows(paths[index], results)
            bar.update(len(results))
    for path in paths:
        for _, row in read_rows(path):
            yield row
