"""What the nodes of a cluster answer while some are being lost, without Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coalign.clusters.placement import Node
from coalign.clusters.ray_connection import Cluster
from coalign.errors import UserError


class RayError(Exception):
    """Stands for Ray's."""


class GetTimeoutError(RayError):
    """Stands for Ray's."""


class Answering(Cluster):
    """A cluster whose nodes do what `acts` says, each time that they are asked: read, or raise."""

    def __init__(self, **acts: list[BaseException | None]) -> None:
        self.is_private, self._shared = False, set()
        self.acts, self.lost = acts, set[str]()
        errors = SimpleNamespace(RayError=RayError, GetTimeoutError=GetTimeoutError)
        self.ray = SimpleNamespace(exceptions=errors, wait=lambda references, **_: (references, []), get=self._get)

    def nodes(self) -> list[Node]:
        return [Node(name, name, 1, 0, 1, 0) for name in self.acts]

    def is_alive(self, node_id: str) -> bool:
        return node_id not in self.lost

    def ask(self, node_id: str, function: Any, *arguments: Any) -> Any:
        return node_id, function, arguments

    def _get(self, reference: Any, timeout: float) -> str:
        node, function, arguments = reference
        error = self.acts[node].pop(0)
        if error:
            raise error
        found: str = function(*arguments)
        return found


def test_a_node_that_is_lost_meanwhile_is_no_reason_to_stop(tmp_path: Path) -> None:
    cluster = Answering(alpha=[None], beta=[RayError("the node does not exist any more")])
    cluster.lost.add("beta")
    cluster.require_shared(tmp_path / "step")


def test_a_node_whose_process_died_is_asked_once_more(tmp_path: Path) -> None:
    Answering(alpha=[None], beta=[RayError("a worker was killed"), None]).require_shared(tmp_path / "step")


@pytest.mark.parametrize("error", [RayError("low on memory"), GetTimeoutError()])
def test_a_node_that_cannot_answer_is_named_and_no_disk_is_blamed(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UserError, match=r"1 of the cluster's nodes can't start a process \(on beta: (low|nothing)"):
        Answering(alpha=[None], beta=[error, error]).require_shared(tmp_path / "step")


def test_a_node_that_sees_another_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Answering(alpha=[None], beta=[None])
    ask = cluster.ask
    elsewhere = str(tmp_path / "elsewhere")
    monkeypatch.setattr(
        cluster, "ask", lambda node, function, *words: ask(node, function, *(words if node == "alpha" else [elsewhere]))
    )
    with pytest.raises(UserError, match=r"not the same disk on 1 of 2 nodes \(on beta: No such file"):
        cluster.require_shared(tmp_path / "step")
