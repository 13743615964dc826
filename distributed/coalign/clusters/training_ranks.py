"""Training ranks on the nodes of a Ray cluster: Ray places and numbers them, DeepSpeed does the rest.

One actor per node holds its CPUs and GPUs, starts its ranks as processes and passes on what they print. Knows no model
and no data: a rank is the command that a launcher would start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any

from coalign.clusters.placement import (
    SAY_SECONDS,
    Demand,
    Node,
    asked_ranks,
    log_demand,
    require_fits,
    spread,
    waiting_words,
)
from coalign.clusters.postmortem import LAST_LINES, ProcessPlace, exit_words, explain_death, say_death, watched
from coalign.clusters.rank_host import LONELY_SECONDS, POLL_SECONDS, Host
from coalign.clusters.ray_connection import Cluster
from coalign.errors import UserError
from coalign.process import Preemption
from coalign.runs.step_folder import LOCK_WAIT

logger = logging.getLogger("coalign")

MAX_RESTARTS = 2  # after lost nodes; a rank's own exit status is final
PLACE_SECONDS = 10.0  # for a placement group that fits: another job may have been quicker
STOP_SECONDS = 30.0  # for a checkpoint, after SIGTERM
END_SECONDS = 15.0  # for killed ranks to be gone
TAKEOVER_SECONDS = 2 * LONELY_SECONDS  # for ranks of a lost node to release the step's folder
LOST = None


@dataclasses.dataclass(frozen=True)
class RankRequest:
    """The ranks of a training step: their command and number (0: automatic), the CPUs of each, the longest wait.

    `grows` says that the cluster is autoscaling, so that more than it has now may be asked for.
    """

    command: tuple[str, ...]
    ranks: int
    cpus_per_rank: int
    wait_seconds: float
    grows: bool


def require_ranks(cluster: Cluster, request: RankRequest) -> None:
    """Raise UserError, after the table of what is asked and free, when the cluster can never hold the ranks."""
    nodes = cluster.nodes()
    require_fits(nodes, asked_ranks(nodes, request.ranks, request.cpus_per_rank), request.grows)


def run_ranks(cluster: Cluster, request: RankRequest, step: str) -> int:
    """Run a training step on the cluster's nodes; return its exit status, 128 + n for signal n.

    After a lost node it restarts on the nodes that are left, from the step's newest checkpoint. SIGTERM and SIGUSR1
    reach the ranks, which write a checkpoint and stop; then it raises SystemExit. Raises UserError when the ranks find
    no room in time, RuntimeError when nodes were lost MAX_RESTARTS + 1 times.
    """
    require_ranks(cluster, request)
    stop = Preemption()
    stop.install()
    try:
        for left in reversed(range(MAX_RESTARTS + 1)):
            group = _RankGroup(cluster, request, step, stop, left < MAX_RESTARTS)
            try:
                code = group.run()
            finally:
                group.close()
            if stop.requested():
                raise SystemExit("stopped by a signal; submit the same job again to go on")
            if code is not LOST:
                return code if code >= 0 else 128 - code
            if not left:
                break
            logger.warning("%s: restarting from the newest checkpoint", step)
    finally:
        stop.remove()
    raise RuntimeError(f"{step}: a node or a process of Ray's was lost {MAX_RESTARTS + 1} times; see above")


class _RankGroup:
    """One attempt: the placement group, an actor on each of its nodes, and the ranks there."""

    def __init__(self, cluster: Cluster, request: RankRequest, step: str, stop: Preemption, takes_over: bool) -> None:
        self.cluster, self.request, self.step, self.stop, self.ray = cluster, request, step, stop, cluster.ray
        self.takes_over = takes_over
        self.reserved: Any = None
        self.hosts: list[Any] = []
        self.places: list[ProcessPlace | None] = []
        self.ranks_of: list[list[int]] = []
        self.last: dict[int, deque[str]] = {}
        self.stopping_since = 0.0

    def run(self) -> int | None:
        """Run the ranks; return the first exit status that isn't 0, else 0; LOST when a node or an actor was lost."""
        counts = self._reserve()
        asked = self.asked
        strategy = self.ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        for bundle, count in enumerate(counts):
            options = {
                "num_cpus": asked.cpus * count,
                "num_gpus": asked.gpus * count,
                "scheduling_strategy": strategy(self.reserved, placement_group_bundle_index=bundle),
                "max_restarts": 0,
                **watched(self.ray),
            }
            self.hosts.append(self.ray.remote(**options)(Host).remote(str(Path.cwd())))
            self.places.append(None)
        met = self._meet()
        if met is LOST:
            return LOST
        return self._watch() if self._start(counts, met) else LOST

    def _reserve(self) -> list[int]:
        """Reserve the CPUs and GPUs of all ranks in a placement group; return the number of ranks in each bundle."""
        since = said = time.monotonic()
        request = self.request
        while True:
            nodes = self.cluster.nodes()
            self.asked = asked = asked_ranks(nodes, request.ranks, request.cpus_per_rank)
            counts = list(spread(nodes, asked, not request.ranks, True).values())
            if counts and self._try(asked, counts):
                return counts
            now = time.monotonic()
            if now - since > request.wait_seconds:
                self._give_up(nodes, asked)
            if now - said > SAY_SECONDS or said == since:
                said = now
                limit = f"{now - since:.0f} s of at most {request.wait_seconds:g}"
                logger.info("%s: %s (%s)", self.step, waiting_words(nodes, asked, asked.count), limit)
            if self.stop.requested():
                raise SystemExit("stopped by a signal; run the same command again to go on")
            time.sleep(POLL_SECONDS)

    def _try(self, asked: Demand, counts: list[int]) -> bool:
        bundles = [{"CPU": asked.cpus * n} | ({"GPU": asked.gpus * n} if asked.gpus else {}) for n in counts]
        group = self.ray.util.placement_group(bundles, strategy="STRICT_SPREAD")
        if group.wait(PLACE_SECONDS):
            self.reserved = group
            return True
        self.ray.util.remove_placement_group(group)
        return False

    def _give_up(self, nodes: list[Node], asked: Demand) -> None:
        log_demand(nodes, asked)
        raise UserError(
            f"{self.step}: the cluster's CPUs and GPUs were not free within"
            f" generation.ray_wait_seconds={self.request.wait_seconds:g}; {waiting_words(nodes, asked, asked.count)};"
            " wait longer, set train.ray_ranks to fewer, or end what holds the cluster (ray list actors)"
        )

    def _meet(self) -> list[tuple[ProcessPlace, str, int]] | None:
        """Return every actor's place, IP address and free port; LOST when an actor is gone."""
        met: list[tuple[ProcessPlace, str, int]] = []
        for host in self.hosts:
            try:
                met.append(self.ray.get(host.meet.remote()))
            except self.ray.exceptions.RuntimeEnvSetupError as error:
                raise UserError(f"{self.step}: Ray can't set up the job's environment on a node: {error}") from None
            except self.ray.exceptions.RayError as error:
                self._say_lost(len(met), error)
                return LOST
            self.places[len(met) - 1] = met[-1][0]
        return met

    def _start(self, counts: list[int], met: list[tuple[ProcessPlace, str, int]]) -> bool:
        """Start the ranks; return False when an actor is gone."""
        world = {"WORLD_SIZE": str(sum(counts)), "MASTER_ADDR": met[0][1], "MASTER_PORT": str(met[0][2])}
        world |= {LOCK_WAIT: f"{TAKEOVER_SECONDS:g}"} if self.takes_over else {}
        first = 0
        started: list[Any] = []
        for host, count, (place, address, _) in zip(self.hosts, counts, met, strict=True):
            numbers = list(range(first, first + count))
            first += count
            self.ranks_of.append(numbers)
            self.last |= {number: deque(maxlen=LAST_LINES) for number in numbers}
            environments = [
                world | {"RANK": str(number), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(count)}
                for local, number in enumerate(numbers)
            ]
            started.append(host.start.remote(self.request.command, environments, address))
            logger.info("%s: ranks %d to %d, %s", self.step, numbers[0], numbers[-1], place)
        for index, reference in enumerate(started):
            try:
                reason = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                self._say_lost(index, error)
                return False
            if reason:
                raise UserError(
                    f"{self.step}: on {met[index][0].host} {reason}; submit with --runtime-env configs/ray_job.yaml,"
                    " or from a folder that every node sees"
                )
        return True

    def _watch(self) -> int | None:
        """Print what the ranks print until they have ended; return as `run` does."""
        codes: dict[int, int | None] = dict.fromkeys(self.last)
        polls = {host.poll.remote(): index for index, host in enumerate(self.hosts)}
        bad: int | None = None
        while polls:
            ready, _ = self.ray.wait(list(polls), num_returns=1, timeout=POLL_SECONDS)
            for reference in ready:
                index = polls.pop(reference)
                try:
                    lines, found, short = self.ray.get(reference)
                except self.ray.exceptions.RayError as error:
                    self._say_lost(index, error)
                    return LOST if bad is None else bad
                for number, line in lines:
                    self.last[number].append(line)
                    print(line, flush=True)
                for number, code in zip(self.ranks_of[index], found, strict=True):
                    if code and codes[number] is None:
                        bad = code if bad is None else bad
                        self._say_ended(number, index, code, short)
                    codes[number] = code
                if None in found:
                    polls[self.hosts[index].poll.remote()] = index
            self._stop_if(bad is not None)
        return bad or 0

    def _stop_if(self, failed: bool) -> None:
        """Pass on a request to stop; where a rank has failed, or did not stop in time, end the others."""
        if not (failed or self.stop.requested()):
            return
        now = time.monotonic()
        if not self.stopping_since:
            self.stopping_since = now
            self._signal(signal.SIGTERM)
        elif now - self.stopping_since > STOP_SECONDS:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        for host in self.hosts:
            with contextlib.suppress(self.ray.exceptions.RayError):
                host.signal.remote(number)

    def _say_ended(self, number: int, index: int, code: int, short: bool) -> None:
        # A rank that was told to stop, or has printed its own error, needs no explanation.
        if code == 2 or self.stopping_since or self.stop.requested():
            return
        place = self.places[index]
        why = exit_words(code) + ("; the kernel of this node killed a process because memory ran out" if short else "")
        who = f"{self.step}: rank {number} on {place.host if place else 'a node'}"
        say_death(logger, who, why, list(self.last[number]), "the others are ended")

    def _say_lost(self, index: int, error: BaseException) -> None:
        place = self.places[index]
        why, lines = explain_death(self.cluster, place, error)
        numbers = self.ranks_of[index] if index < len(self.ranks_of) else []
        who = f"{self.step}: Ray's process for ranks {numbers}" + (f" ({place})" if place else "")
        say_death(logger, who, why, lines, "the others are ended")

    def close(self) -> None:
        """End what is left and remove the placement group: ranks of the next attempt must not meet these."""
        ending = [host.end.remote() for host in self.hosts]
        if ending:
            self.ray.wait(ending, num_returns=len(ending), timeout=END_SECONDS)
        for host in self.hosts:
            with contextlib.suppress(self.ray.exceptions.RayError):
                self.ray.kill(host)
        if self.reserved is not None:
            self.ray.util.remove_placement_group(self.reserved)
