"""A connection to Ray: which address to use, the nodes, what they answer, whether they see a folder.

Without an address a private cluster is started, which ends with the connection. Knows neither rows nor models.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coalign.clusters.placement import Node
from coalign.clusters.private_ray import END_SECONDS, QUIET, address_of, import_ray, start_holder
from coalign.clusters.slurm_node import wait_for
from coalign.config import GenerationTable
from coalign.errors import UserError
from coalign.process import node_names, start_seconds

ANSWER_SECONDS = 120.0  # a node may take this long to start a process and read a file
CONNECT_SECONDS = 5.0
MIN_WORKERS_ALLOWED, WORKERS_PER_CORE = 64, 4  # processes of a private cluster that can't be meant
LOOK_SECONDS = 2.0  # between two looks at which nodes are alive
JOB_FOLDER = "working_dir_files"  # where Ray unpacks a job's working folder, which it removes with the job


def ray_address(generation: GenerationTable) -> str:
    """Return the Ray cluster to use: generation.ray_address, else RAY_ADDRESS, else "" for a private one."""
    return generation.ray_address or os.environ.get("RAY_ADDRESS", "")


class Cluster:
    """A connection to the cluster at an address, or to a private one that ends with it. `ray` is the module.

    A private cluster has at least `workers` CPUs. Raises UserError when there is no connection.
    """

    def __init__(self, address: str, workers: int) -> None:
        cores = os.cpu_count() or 1
        if not address and workers > max(MIN_WORKERS_ALLOWED, WORKERS_PER_CORE * cores):
            raise UserError(
                f"generation.workers={workers:,} on this machine of {cores} cores: each is a process with a model"
                f" of its own; use {cores} at most, or generation.ray_address of a cluster"
            )
        self.is_private = not address
        self._shared: set[Path] = set()  # folders that every node sees
        self._holder = None if address else start_holder(workers)
        try:
            self.address = address_of(self._holder) if self._holder else address
            self.ray = import_ray()
            nodes = node_names() if self.address == os.environ.get("RAY_ADDRESS") else []
            self._connect(start_seconds() if nodes else 0.0)
            wait_for(nodes, lambda: _nodes_there(self.ray, nodes), "the Ray cluster of this job")
        except BaseException:
            self._end_holder()
            raise

    def _connect(self, patience: float) -> None:
        """Connect. A cluster that is still starting may take `patience` seconds. Raises UserError."""
        deadline = time.monotonic() + patience
        while True:
            try:
                _require_listener(self.address)
                self.ray.init(address=self.address, **QUIET)
                return
            except (OSError, ValueError, RuntimeError, self.ray.exceptions.RayError) as error:
                if time.monotonic() > deadline or type(error).__name__ == "AuthenticationError":
                    raise UserError(f"Ray can't be reached at {self.address}: {_first_sentences(error)}") from error
            self.ray.shutdown()
            time.sleep(0.2)

    def close(self) -> None:
        """Disconnect, which ends a private cluster."""
        self.ray.shutdown()
        self._end_holder()

    def nodes(self) -> list[Node]:
        """Return the living nodes that have CPUs."""
        alive = [node for node in self.ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        names = [node["NodeManagerHostname"] for node in alive]
        free = self.ray._private.state.available_resources_per_node()  # the public call adds up all nodes
        return [
            Node(
                node["NodeID"],
                name if names.count(name) == 1 else f"{name} ({node['NodeManagerAddress']})",
                node["Resources"].get("CPU", 0.0),
                node["Resources"].get("GPU", 0.0),
                free.get(node["NodeID"], {}).get("CPU", 0.0),
                free.get(node["NodeID"], {}).get("GPU", 0.0),
            )
            for node, name in zip(alive, names, strict=True)
        ]

    def is_alive(self, node_id: str) -> bool:
        """Return whether a node still belongs to the cluster."""
        return any(node["NodeID"] == node_id and node["Alive"] for node in self.ray.nodes())

    def on_node(self, node_id: str) -> Any:
        """Return the scheduling strategy that places a task or an actor on one node."""
        return self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)

    def ask(self, node_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return a reference to the result of a function on a node; it runs without waiting for a CPU."""
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": self.on_node(node_id)}
        return self.ray.remote(**options)(function).remote(*arguments)

    def require_shared(self, folder: Path) -> None:
        """Raise UserError unless every node sees what this process writes into a folder; asks once per folder."""
        if self.is_private or folder in self._shared:
            return
        if JOB_FOLDER in folder.absolute().parts:
            raise UserError(
                f"run.folder: {folder} lies in the job's own folder, which Ray removes with the job; use a folder that"
                " every node sees, such as run.folder=/shared/runs"
            )
        probe = folder / f".seen-{secrets.token_hex(8)}"
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text(probe.name, encoding="utf-8")
        try:
            answers = self._answers(_read, str(probe.absolute()))
        finally:
            probe.unlink(missing_ok=True)
        blind = {name: answer for name, answer in answers.items() if answer != probe.name}
        if blind:
            name, answer = next(iter(blind.items()))
            raise UserError(
                f"run.folder: {folder.absolute()} is not the same disk on {len(blind)} of {len(answers)} nodes (on"
                f" {name}: {answer}); use a folder on storage that every node mounts, such as run.folder=/shared/runs"
            )
        self._shared.add(folder)

    def _answers(self, function: Callable[..., str], *arguments: Any) -> dict[str, str]:
        """Return {node name: what a function returns there}, without nodes that are lost meanwhile.

        Asks twice. Raises UserError when a living node still can't answer.
        """
        nodes, answers, silent = self.nodes(), dict[str, str](), dict[str, str]()
        for _ in range(2):
            asked = {node: self.ask(node.id, function, *arguments) for node in nodes}
            self._await(asked)
            silent = {}
            for node, reference in asked.items():
                try:
                    answers[node.name] = self.ray.get(reference, timeout=0)
                except self.ray.exceptions.GetTimeoutError:
                    silent[node.id] = f"{node.name}: nothing within {ANSWER_SECONDS:.0f} s"
                except self.ray.exceptions.RayError as error:
                    silent[node.id] = f"{node.name}: {one_line(error)}"
            nodes = [node for node in nodes if node.id in silent and self.is_alive(node.id)]
            if not nodes:
                return answers
        raise UserError(
            f"{len(nodes)} of the cluster's nodes can't start a process (on {silent[nodes[0].id]}); see `ray status`,"
            " and try again"
        )

    def _await(self, asked: dict[Node, Any]) -> None:
        """Return when all living nodes have answered, after ANSWER_SECONDS at most; lost nodes never answer."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while asked and time.monotonic() < deadline:
            ready, _ = self.ray.wait(list(asked.values()), num_returns=len(asked), timeout=LOOK_SECONDS)
            asked = {n: reference for n, reference in asked.items() if reference not in ready and self.is_alive(n.id)}

    def _end_holder(self) -> None:
        if self._holder is not None:
            assert self._holder.stdin is not None
            self._holder.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._holder.wait(2 * END_SECONDS)


class _NobodyListensError(OSError):
    """Nobody listens at an address. Ray itself raises a ConnectionError, an OSError too, for a refused token."""


def _require_listener(address: str) -> None:
    """Raise _NobodyListensError for a host:port without a listener, where ray.init would go on trying for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([\w.:-]+?)\]?:([0-9]{1,5})", address)
    if found:  # anything else, such as auto, is Ray's to read
        try:
            socket.create_connection((found[1], int(found[2])), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _NobodyListensError(str(error)) from error


def node_resource(name: str) -> str:
    """Return the name of the Ray resource that marks a node of a Slurm job."""
    return f"coalign:{name}"


def _nodes_there(ray: Any, names: list[str]) -> set[str]:
    have = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return {name for name in names if any(node_resource(name) in resources for resources in have)}


def _read(path: str) -> str:
    """Return what a file holds, or why it can't be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        return error.strerror or str(error)


def one_line(error: BaseException) -> str:
    """Return what an error of Ray's says, on one line of at most 600 characters."""
    return " ".join(str(error).split())[:600] or type(error).__name__


def _first_sentences(error: BaseException) -> str:
    """Return what Ray says, and what a refused token would need: Ray may report it like a missing cluster."""
    if isinstance(error, _NobodyListensError):
        return (
            f"nobody listens there ({one_line(error)}); start the cluster, or unset RAY_ADDRESS and"
            " generation.ray_address for a private one"
        )
    token = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what the cluster was started with"
    if type(error).__name__ == "AuthenticationError":
        return f"it refuses this token; {token}"
    return f"{one_line(error)} (where a cluster runs, it may refuse this token: {token})"
