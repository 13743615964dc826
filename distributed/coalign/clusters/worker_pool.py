"""Shards over Ray actors: a bounded number in flight, retried when an actor dies, returned to the driver.

With generation.workers = 0 this process does all the work. Knows neither models nor what a row means.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from coalign.clusters.placement import SAY_SECONDS, Demand, asked_workers, log_demand, require_fits, waiting_words
from coalign.clusters.postmortem import ProcessPlace, explain_death, here, say_death, watched
from coalign.clusters.ray_connection import Cluster, ray_address
from coalign.config import GenerationTable
from coalign.errors import UserError
from coalign.failures import out_of_memory
from coalign.records import Row, Worker

logger = logging.getLogger("coalign")

MAX_IN_FLIGHT = 2  # shards per worker: one running, one waiting, so that no worker idles
MAX_RETRIES = 2  # a shard that fails 1 + MAX_RETRIES times fails the step
END_SECONDS = 10.0  # a killed actor may take this long to end


class _Actor:
    """One process of the pool. A call's first shard builds its worker, so that an error reaches the driver."""

    def __init__(self, folder: str) -> None:
        # Relative paths in the settings mean the driver's folder, wherever the cluster was started.
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._call = -1
        self._worker: Worker | None = None

    def place(self) -> ProcessPlace:
        """Return where this process runs."""
        return here()

    def run(self, call: int, make_worker: Callable[[], Worker], rows: list[Row]) -> list[Row]:
        """Return the results of some rows, one per row; another `call` than before builds a new worker."""
        if call != self._call or self._worker is None:
            self._worker = None  # free the old model before the new one is loaded
            gc.collect()
            self._worker, self._call = make_worker(), call
        return self._worker(rows)


def require_workers(cluster: Cluster, settings: GenerationTable) -> Demand:
    """Return what [generation] asks for. Raises UserError, after the table, when the cluster can never hold it."""
    nodes = cluster.nodes()
    asked = asked_workers(nodes, settings)
    require_fits(nodes, asked, settings.ray_grows)
    return asked


@dataclasses.dataclass(eq=False)
class _Member:
    """An actor of the pool: the reference to its place, which comes when it has started, and its shards in flight."""

    actor: Any
    greeting: Any
    place: ProcessPlace | None = None
    in_flight: int = 0


class _Pool:
    """A connection to Ray and its actors, kept until this process ends, since starting them takes seconds."""

    def __init__(self, settings: GenerationTable) -> None:
        self.calls = 0
        self.members: list[_Member] = []
        self.cluster = Cluster(ray_address(settings), settings.workers)
        self.ray = self.cluster.ray
        atexit.register(self.close)
        self.wait_seconds = settings.ray_wait_seconds
        self.asked = require_workers(self.cluster, settings)
        options = {"num_cpus": self.asked.cpus, "num_gpus": self.asked.gpus, **watched(self.ray)}
        self._make = self.ray.remote(max_restarts=0, max_task_retries=0, **options)(_Actor)
        self.members = [self._start() for _ in range(settings.workers)]
        where = "a private cluster" if self.cluster.is_private else self.cluster.address
        shown = f"{self.asked.gpus:g} GPU" if self.asked.gpus else "1 CPU"
        logger.info("%d Ray workers on %s, each with %s", settings.workers, where, shown)

    def _start(self) -> _Member:
        actor = self._make.remote(str(Path.cwd()))
        return _Member(actor, actor.place.remote())

    def replace(self, member: _Member) -> None:
        """Start another actor, on any node, in place of a dead one."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.kill(member.actor)  # it may be alive and out of reach
        self.members[self.members.index(member)] = self._start()

    def close(self) -> None:
        """Disconnect, which ends the actors and a private cluster; return when the actors of this machine are gone."""
        atexit.unregister(self.close)
        self.cluster.close()
        # A step that follows at once must find their memory free, on the GPUs above all.
        places = [member.place for member in self.members if member.place]
        mine = [Path("/proc", str(place.process)) for place in places if place.host == platform.node()]
        deadline = time.monotonic() + END_SECONDS
        while any(path.exists() for path in mine) and time.monotonic() < deadline:
            time.sleep(0.02)


_pools: dict[tuple[int, float, str], _Pool] = {}


def close_pools() -> None:
    """End all workers and the connection to the cluster now rather than when this process ends."""
    for pool in _pools.values():
        pool.close()
    _pools.clear()


def _pool(settings: GenerationTable) -> _Pool:
    key = (settings.workers, settings.gpus_per_worker, settings.ray_address)
    if key not in _pools:
        close_pools()
        _pools[key] = _Pool(settings)
    return _pools[key]


def require_shared(settings: GenerationTable, folder: Path) -> None:
    """Raise UserError unless every node of the workers' cluster sees a folder; asks once per folder."""
    _pool(settings).cluster.require_shared(folder)


def map_shards(
    make_worker: Callable[[], Worker],
    shards: Sequence[tuple[int, list[Row]]],
    settings: GenerationTable,
    title: str,
) -> Iterator[tuple[int, list[Row]]]:
    """Yield (shard index, results) in the order in which they are done.

    An actor that dies is replaced and its shards are retried. Raises RuntimeError with the index of a shard that fails
    1 + MAX_RETRIES times, UserError for one that a worker raises, and UserError when no worker gets its CPUs and GPUs
    within generation.ray_wait_seconds.
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
    yield from _Call(pool, make_worker, shards, title).run()


class _Call:
    """One call of map_shards: the shards that wait, and those in flight with their member."""

    def __init__(
        self, pool: _Pool, make_worker: Callable[[], Worker], shards: Sequence[tuple[int, list[Row]]], title: str
    ) -> None:
        self.pool, self.make_worker, self.title, self.ray = pool, make_worker, title, pool.ray
        self.waiting = list(reversed(shards))
        self.in_flight: dict[Any, tuple[int, list[Row], _Member]] = {}
        self.tries: Counter[int] = Counter()
        self.failed_starts = 0
        self.since = self.said = time.monotonic()

    def run(self) -> Iterator[tuple[int, list[Row]]]:
        """Yield (shard index, results) as they are done."""
        while self.waiting or self.in_flight:
            self._feed()
            starting = {member.greeting: member for member in self.pool.members if member.place is None}
            ready, _ = self.ray.wait([*self.in_flight, *starting], num_returns=1, timeout=SAY_SECONDS)
            if starting:
                self._look(len(starting))
            for reference in ready:
                if reference in starting:
                    self._greet(starting[reference])
                elif (done := self._take(reference)) is not None:
                    yield done

    def _feed(self) -> None:
        """Give each member a shard, and a second one unless a member that is still starting could take it."""
        for depth in range(1, MAX_IN_FLIGHT + 1):
            to_come = sum(member.place is None for member in self.pool.members) if depth > 1 else 0
            for member in self.pool.members:
                if member.place and member.in_flight < depth and len(self.waiting) > to_come:
                    index, rows = self.waiting.pop()
                    with _full_store(self.ray, index, self.title):
                        reference = member.actor.run.remote(self.pool.calls, self.make_worker, rows)
                    self.in_flight[reference] = (index, rows, member)
                    member.in_flight += 1

    def _greet(self, member: _Member) -> None:
        """Record where a member runs; replace one that died before it could report that."""
        try:
            member.place = self.ray.get(member.greeting)
            self.failed_starts = 0
            logger.info("%s: a worker has started, %s", self.title, member.place)
        except self.ray.exceptions.RuntimeEnvSetupError as error:
            raise UserError(f"{self.title}: Ray can't set up the job's environment on a node: {error}") from None
        except self.ray.exceptions.RayError as error:
            self.failed_starts += 1
            if self.failed_starts > MAX_RETRIES:
                raise RuntimeError(
                    f"{self.title}: no worker starts, {self.failed_starts} died at once: {error}"
                ) from None
            self._bury(member, error)

    def _bury(self, member: _Member, error: BaseException) -> str:
        """Log why a member died, replace it, and return the cause."""
        if member not in self.pool.members:
            return "it ended with another shard"
        why, lines = explain_death(self.pool.cluster, member.place, error)
        who = f"{self.title}: the worker ({member.place})" if member.place else f"{self.title}: a worker"
        say_death(logger, who, why, lines, "another takes its place")
        self.pool.replace(member)
        self.since = time.monotonic()
        return why

    def _take(self, reference: Any) -> tuple[int, list[Row]] | None:
        """Return a shard's results; None when its member has died, and the shard waits again."""
        index, rows, member = self.in_flight.pop(reference)
        member.in_flight -= 1
        self.since = time.monotonic()
        errors = self.ray.exceptions
        try:
            with _full_store(self.ray, index, self.title):
                return index, self.ray.get(reference)
        except errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from None
            if type(cause).__name__ == "OutOfMemoryError":
                raise UserError(f"{self.title}: {out_of_memory(cause)}") from None
            raise RuntimeError(f"{self.title}: shard {index} failed: {cause!r}\n{error}") from None
        except errors.ObjectLostError as error:  # its node was lost after the work was done
            self._retry(index, rows, str(error))
        except errors.RayError as error:
            self._retry(index, rows, self._bury(member, error))
        return None

    def _retry(self, index: int, rows: list[Row], why: str) -> None:
        self.tries[index] += 1
        if self.tries[index] > MAX_RETRIES:
            raise RuntimeError(
                f"{self.title}: shard {index} (or one beside it) ended its worker {1 + MAX_RETRIES} times: {why}"
            ) from None
        logger.warning("%s: shard %d is tried again", self.title, index)
        self.waiting.append((index, rows))

    def _look(self, missing: int) -> None:
        """Log now and then what is waited for. Raises UserError when no worker has started in time."""
        now, pool = time.monotonic(), self.pool
        nobody = missing == len(pool.members)
        waited = now - self.since
        if now - self.said < SAY_SECONDS and not (nobody and waited > pool.wait_seconds):
            return
        self.said = now
        nodes = pool.cluster.nodes()
        words = waiting_words(nodes, pool.asked, missing)
        if nobody and waited > pool.wait_seconds:
            log_demand(nodes, pool.asked)
            raise UserError(
                f"{self.title}: no worker has started within generation.ray_wait_seconds={pool.wait_seconds:g};"
                f" {words}; wait longer, ask for less, or end what holds the cluster (ray list actors); finished"
                " shards are kept"
            )
        limit = f"{waited:.0f} s of at most {pool.wait_seconds:g}" if nobody else "the others work"
        logger.info("%s: %s (%s)", self.title, words, limit)


@contextlib.contextmanager
def _full_store(ray: Any, index: int, title: str) -> Iterator[None]:
    """Turn what Ray raises when rows or results find no space into a UserError."""
    full = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)
    try:
        yield
    except (*full, ray.exceptions.RayTaskError) as error:
        if not isinstance(getattr(error, "cause", error), full):
            raise
        raise UserError(
            f"{title}: no space in the Ray object store for shard {index}; use a smaller generation.shard_size, or"
            " free space in /dev/shm and /tmp; finished shards are kept"
        ) from None
