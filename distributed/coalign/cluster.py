"""Connections to Ray, and private clusters, each held by a process that ends it with its user. The only import of Ray.

Used by pool.py (a step run alone starts its own cluster), ranks.py, and launch/cluster.sh (one serves all steps of a
script). Knows neither rows nor models.

    python -m coalign.cluster WORKERS     # prints the address; the end of its input, or of its parent, ends the cluster
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from coalign.allocation import node_names, start_seconds, wait_for
from coalign.errors import UserError
from coalign.placement import Node

START_SECONDS = 240.0  # an idle machine needs 2; Ray itself gives up after more than 30, see START_ATTEMPTS
START_ATTEMPTS = 3
READY = "ready"  # what the process that keeps a private cluster says of itself
MAX_PARENT = 10  # characters; Ray puts sockets deep below, whose paths may not be longer than 107
END_SECONDS = 20.0  # for Ray's own way of ending; what is left then is killed
ANSWER_SECONDS = 120.0  # that a node may take to start a process and read a file
JOB_FOLDER = "working_dir_files"  # where Ray unpacks a job's working folder, and removes it with the job
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


class Cluster:
    """A connection to the cluster at an address, or to a private one that ends with it. `ray` is the module."""

    def __init__(self, address: str, workers: int) -> None:
        self.is_private = not address
        self._holder = None if address else _start_holder(workers)
        try:
            self.address = _address_of(self._holder) if self._holder else address
            self.ray = import_ray()
            nodes = node_names() if self.address == os.environ.get("RAY_ADDRESS") else []
            self._connect(start_seconds() if nodes else 0.0)
            wait_for(nodes, lambda: _nodes_there(self.ray, nodes), "the Ray cluster of this job")
        except BaseException:
            self._end_holder()
            raise

    def _connect(self, patience: float) -> None:
        """Connect; a cluster that starts at the same time may take so many seconds."""
        deadline = time.monotonic() + patience
        host, _, port = self.address.rpartition(":")
        while True:
            try:
                if patience:  # Ray itself gives up in a rough way where nobody listens yet
                    socket.create_connection((host, int(port)), timeout=5.0).close()
                self.ray.init(address=self.address, **QUIET)
                return
            except (OSError, ValueError, RuntimeError, self.ray.exceptions.RayError) as error:
                if time.monotonic() > deadline or type(error).__name__ == "AuthenticationError":
                    raise UserError(f"Ray can't be reached at {self.address}: {_first_sentences(error)}") from error
            self.ray.shutdown()
            time.sleep(0.2)

    def close(self) -> None:
        """Disconnect; a private cluster ends."""
        self.ray.shutdown()
        self._end_holder()

    def nodes(self) -> list[Node]:
        """Return the living nodes on which something can run."""
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
        """Return whether a node is part of the cluster still."""
        return any(node["NodeID"] == node_id and node["Alive"] for node in self.ray.nodes())

    def on_node(self, node_id: str) -> Any:
        """Return what places a task or an actor on one node."""
        return self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)

    def ask(self, node_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return a reference to what a function answers on a node; it waits for no CPU."""
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": self.on_node(node_id)}
        return self.ray.remote(**options)(function).remote(*arguments)

    def require_shared(self, folder: Path) -> None:
        """Raise UserError unless every node sees what this process writes into a folder."""
        if self.is_private:
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
            found = {n.name: self.ask(n.id, _read, str(probe.absolute())) for n in self.nodes()}
            ready, _ = self.ray.wait(list(found.values()), num_returns=len(found), timeout=ANSWER_SECONDS)
            answers = {name: self._answer(ref, ref in ready) for name, ref in found.items()}
        finally:
            probe.unlink(missing_ok=True)
        blind = {name: answer for name, answer in answers.items() if answer != probe.name}
        if blind:
            name, answer = next(iter(blind.items()))
            raise UserError(
                f"run.folder: {folder.absolute()} is not the same disk on {len(blind)} of {len(answers)} nodes (on"
                f" {name}: {answer}); use a folder on storage that every node mounts, such as run.folder=/shared/runs"
            )

    def _answer(self, reference: Any, is_ready: bool) -> str:
        if not is_ready:
            return f"no answer within {ANSWER_SECONDS:.0f} s"
        try:
            answer: str = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            return one_line(error)
        return answer

    def _end_holder(self) -> None:
        if self._holder is not None:
            assert self._holder.stdin is not None
            self._holder.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._holder.wait(2 * END_SECONDS)


def node_resource(name: str) -> str:
    """Return the Ray resource by which the node of a Slurm job is known."""
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
    """Return what an error of Ray's says, on one line."""
    return " ".join(str(error).split())[:600] or type(error).__name__


def _first_sentences(error: BaseException) -> str:
    """Return what Ray says, which may not tell a refused token from a cluster that isn't there."""
    token = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what the cluster was started with"
    if type(error).__name__ == "AuthenticationError":
        return f"it refuses this token; {token}"
    return f"{one_line(error)} (where a cluster runs, it may refuse this token: {token})"


def import_ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray


def _start_holder(workers: int) -> subprocess.Popen[str]:
    """Start a private cluster and return the process that holds it; this process gets what it needs to connect."""
    _make_private()
    # Like -m coalign.cluster, also where the package is on this process's path alone.
    code = "import sys; sys.path += sys.argv[2:]; from coalign.cluster import hold; sys.exit(hold(int(sys.argv[1])))"
    command = [sys.executable, "-P", "-c", code, str(workers), str(Path(__file__).parents[1])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _make_private() -> None:
    """Let only those who know a token run code in the cluster, and only this machine see its ports."""
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's name for the choice of 127.0.0.1


def _address_of(holder: subprocess.Popen[str]) -> str:
    """Wait until the cluster is ready and return its address."""
    assert holder.stdout is not None
    ready, _, _ = select.select([holder.stdout], [], [], START_SECONDS)
    line = holder.stdout.readline().strip() if ready else ""
    if line.startswith("error: "):
        raise UserError(line.removeprefix("error: "))
    if not line:
        why = f"was not ready after {START_SECONDS:.0f} s" if not ready else "ended while it started"
        raise UserError(f"a private Ray cluster {why}; set generation.workers=0 to do without Ray")
    return line


def hold(workers: int) -> int:
    """Start a private cluster, print its address and keep it until stdin or the parent ends; return the exit code.

    Then every process of it ends, whatever state it is in, and its folder goes. So nothing stays behind of a step or a
    script that is killed in any way.
    """
    parent = os.getppid()
    with contextlib.suppress(PermissionError):
        os.setsid()  # Ctrl-C and a closed terminal mean the parent, which then lets go of this process in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _make_private()
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # Ray itself gives up after 30
    reason = ""
    for _ in range(START_ATTEMPTS):
        folder = _fresh_folder()
        said, code = _attempt(folder, workers, parent)
        remove_cluster(folder)
        if said == READY or code == 128 + signal.SIGTERM or os.getppid() != parent:
            return code
        reason = said or f"its process ended with {code}"
    print(f"error: a private Ray cluster can't be started: {reason}", flush=True)
    return 2


def _attempt(folder: Path, workers: int, parent: int) -> tuple[str, int]:
    """Keep a cluster in a process of its own, since Ray may abort it, and leaves it in disorder when a start fails.

    Returns READY or why there was no cluster, and the exit code.
    """
    output, report = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(output)
        os._exit(_keep(folder, workers, report))
    os.close(report)

    def end(number: int = 0, frame: FrameType | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    said = b""
    while True:
        if os.getppid() != parent:
            end()
        if select.select([output], [], [], 1.0)[0]:
            if not (part := os.read(output, 4096)):
                break
            said += part
    os.close(output)
    return said.decode(errors="replace"), os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1])


def _keep(folder: Path, workers: int, report: int) -> int:
    holder = os.getppid()
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        address = _start_ray(folder, max(workers, os.cpu_count() or 1))
        os.write(report, READY.encode())
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            print(address, flush=True)
        _wait_for_end(holder)
        return 0
    except SystemExit as stop:
        return int(stop.code or 0)
    except Exception as error:  # which Ray itself raises when a busy machine is too slow for it
        os.write(report, " ".join(str(error).split())[:2000].encode() or b"no reason was given")
        return 1
    finally:
        _end(folder)


def _start_ray(folder: Path, cpus: int) -> str:
    ray = import_ray()
    inside = str(folder / "r")  # Ray opens the folder that it is given to everybody, this one it leaves as it is
    context = ray.init(address="local", _temp_dir=inside, include_dashboard=False, num_cpus=cpus, **QUIET)
    signal.signal(signal.SIGTERM, _exit_on_signal)  # Ray has put its own there
    address: str = context.address_info["gcs_address"]
    return address


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _wait_for_end(parent: int) -> None:
    """Return when stdin has ended or the process that started this one is gone."""
    while os.getppid() == parent:
        ready, _, _ = select.select([sys.stdin], [], [], 1.0)
        if ready and not os.read(sys.stdin.fileno(), 1024):
            return


def _end(folder: Path) -> None:
    """End the cluster in a folder: Ray's way first, within a limit, then whatever still runs there."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "ray" in sys.modules:
        shutdown = threading.Thread(target=sys.modules["ray"].shutdown, daemon=True)
        shutdown.start()
        shutdown.join(END_SECONDS)
    remove_cluster(folder)


def remove_cluster(folder: Path) -> None:
    """Kill the processes that work in a cluster's folder and remove it."""
    deadline = time.monotonic() + END_SECONDS
    while (found := list(processes_in(folder))) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def processes_in(folder: Path) -> Iterator[int]:
    """Yield Ray's processes of the cluster in a folder.

    Their command line names it, or is overwritten with ray::NAME; those have their logs in it open. A step that is
    connected also has, and is none of them.
    """
    inside = f"{folder}{os.sep}"
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            program = (entry / "exe").readlink().name
            if words.startswith("ray::"):
                ours = any(_target(link).startswith(inside) for link in (entry / "fd").iterdir())
            else:  # not an editor that shows one of its logs
                ours = inside in words and program.startswith(("python", "raylet", "gcs_server"))
            if ours:
                yield int(entry.name)


def _target(link: Path) -> str:
    with contextlib.suppress(OSError):
        return str(link.readlink())
    return ""


def _fresh_folder() -> Path:
    """Return a new folder for a private cluster, after removing those whose holder was killed, processes included."""
    parent = Path(tempfile.gettempdir() if len(tempfile.gettempdir()) <= MAX_PARENT else "/tmp")
    for left in parent.glob("coalign-ray-*-*"):
        with contextlib.suppress(OSError):  # another process may be removing it as well
            if left.stat().st_uid == os.getuid() and not Path("/proc", left.name.split("-")[2]).exists():
                remove_cluster(left)
    return Path(tempfile.mkdtemp(prefix=f"coalign-ray-{os.getpid()}-", dir=parent))


if __name__ == "__main__":
    sys.exit(hold(int(sys.argv[1])))
