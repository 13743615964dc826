"""What the pool does when workers die, start late or never: against a stand-in for Ray, without processes."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from coalign.clusters import worker_pool
from coalign.clusters.placement import Demand, Node
from coalign.errors import UserError


class RayError(Exception):
    """Every error of Ray's."""


class RayTaskError(RayError):
    """Raised inside a worker."""


class RayActorError(RayError):
    """The worker is dead."""


class ObjectLostError(RayError):
    """The result is gone."""


class RuntimeEnvSetupError(RayError):
    """A node could not be prepared."""


class FullError(RayError):
    """No space."""


ERRORS = SimpleNamespace(
    RayError=RayError,
    RayTaskError=RayTaskError,
    RayActorError=RayActorError,
    ObjectLostError=ObjectLostError,
    RuntimeEnvSetupError=RuntimeEnvSetupError,
    ObjectStoreFullError=FullError,
    OutOfDiskError=FullError,
)


class Reference:
    """A call's result to come: of a shard, or without rows of the question where an actor is."""

    def __init__(self, actor: FakeActor, rows: list[Any] | None, answers: bool) -> None:
        self.actor, self.rows, self.answers = actor, rows, answers


class FakeActor:
    """Works off shards at once; dies at the first that `fatal` holds, and with it what it has been given."""

    def __init__(self, fatal: set[str], starts: bool = True) -> None:
        self.fatal, self.starts, self.dead, self.given = fatal, starts, False, []
        self.run = SimpleNamespace(remote=self._run)

    def _run(self, call: int, make_worker: Any, rows: list[Any]) -> Any:
        self.given.append(rows[0]["name"])
        return Reference(self, rows, True)

    def answer(self, rows: list[Any]) -> list[Any]:
        if self.dead or {row["name"] for row in rows} & self.fatal:
            self.dead = True
            raise RayActorError("exit code 1")
        return [{"name": row["name"], "by": id(self)} for row in rows]


class FakePool:
    """Members and a stand-in for Ray, whose clock goes on by a second with every wait."""

    def __init__(self, actors: list[FakeActor], spare: list[FakeActor], wait_seconds: float = 30.0) -> None:
        self.calls, self.spare, self.wait_seconds = 1, spare, wait_seconds
        self.asked = Demand("workers", "generation.workers=2", 2, 1.0, 0.0)
        nodes = [Node("a", "alpha", 4, 0, 0, 0)]
        self.cluster = SimpleNamespace(nodes=lambda: nodes)
        self.ray = SimpleNamespace(exceptions=ERRORS, get=self.get, wait=self.wait)
        self.members = [self.member(actor) for actor in actors]

    def member(self, actor: FakeActor) -> Any:
        return SimpleNamespace(actor=actor, greeting=Reference(actor, None, actor.starts), place=None, in_flight=0)

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        ready = [reference for reference in references if reference.answers][:1]
        return ready, [reference for reference in references if reference not in ready]

    def get(self, reference: Any) -> Any:
        return "somewhere" if reference.rows is None else reference.actor.answer(reference.rows)

    def replace(self, member: Any) -> None:
        self.members[self.members.index(member)] = self.member(self.spare.pop(0))


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = itertools.count(0, 10)
    monkeypatch.setattr(worker_pool, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(worker_pool, "explain_death", lambda cluster, place, error: (str(error), ["its last words"]))
    monkeypatch.setattr(logging.getLogger("coalign"), "propagate", True)
    caplog.set_level("INFO", "coalign")


def shards(number: int) -> list[tuple[int, list[Any]]]:
    return [(index, [{"name": f"s{index}"}]) for index in range(number)]


def run(fake: FakePool, number: int) -> dict[int, Any]:
    return dict(worker_pool._Call(fake, lambda: None, shards(number), "sampling").run())  # type: ignore[arg-type]


def test_a_dead_worker_is_replaced_and_its_shards_are_done(caplog: pytest.LogCaptureFixture) -> None:
    """Both shards in flight are tried again, nothing else is; the cause and the last lines are printed."""
    bad, good, fresh = FakeActor({"s0"}), FakeActor(set()), FakeActor(set())
    fake = FakePool([bad, good], [fresh])
    done = run(fake, 9)
    assert sorted(done) == list(range(9))
    assert all(rows[0]["name"] == f"s{index}" for index, rows in done.items())
    again = [record.getMessage() for record in caplog.records if "tried again" in record.getMessage()]
    assert len(again) == len(set(bad.given)) <= worker_pool.MAX_IN_FLIGHT
    assert "sampling: the worker (somewhere) ended: exit code 1; another takes its place" in caplog.text
    assert caplog.text.count("its last words") == 1
    assert fresh.given


def test_a_shard_that_ends_every_worker_is_named() -> None:
    fake = FakePool([FakeActor({"s1"})], [FakeActor({"s1"}) for _ in range(5)])
    with pytest.raises(RuntimeError, match=r"shard \d \(or one beside it\) ended its worker 3 times: exit code 1"):
        run(fake, 4)


def test_others_work_while_one_has_no_place(caplog: pytest.LogCaptureFixture) -> None:
    """No shard waits for a worker that never comes, and the log says what is waited for."""
    good, late = FakeActor(set()), FakeActor(set(), starts=False)
    assert sorted(run(FakePool([late, good], []), 6)) == list(range(6))
    assert len(good.given) == 6 and not late.given
    assert "waiting for 1 of 2 workers (1 CPU each); free: alpha 0 of 4 CPU (the others work)" in caplog.text


def test_waiting_for_the_first_worker_has_an_end(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakePool([FakeActor(set(), starts=False) for _ in range(2)], [], wait_seconds=100.0)
    with pytest.raises(
        UserError, match=r"no worker has started within generation\.ray_wait_seconds=100; waiting for 2"
    ):
        run(fake, 3)
    assert "s of at most 100)" in caplog.text
    assert "asked: 2 workers, each with 1 CPU on one node (generation.workers=2)" in caplog.text
