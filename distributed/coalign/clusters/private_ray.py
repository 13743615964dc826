"""A private Ray cluster on this machine, held by a process that ends it together with its user. The only import of Ray.

    python -m coalign.clusters.private_ray WORKERS     # prints the address; ends with its input or its parent

A step that runs alone starts a cluster of its own; launch/cluster.sh starts one for all steps of a script. Knows
neither workers nor steps.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from coalign.errors import UserError

READY_SECONDS = 240.0  # an idle machine needs 2; Ray itself gives up after more than 30, see START_ATTEMPTS
START_ATTEMPTS = 3
READY = "ready"  # the report of a process that keeps a cluster, once Ray runs
MAX_PARENT = 10  # characters; Ray's sockets lie deep below, and their paths may have 107 at most
END_SECONDS = 20.0  # for Ray's own shutdown; what is left then is killed
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def import_ray() -> Any:
    """Return the module ray, told to report no usage and to hide no GPU from processes that ask for none."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray


def start_holder(workers: int) -> subprocess.Popen[str]:
    """Start a private cluster of at least `workers` CPUs and return the process that holds it.

    This process's environment gets the token that a connection needs.
    """
    _make_private()
    # As -m coalign.clusters.private_ray does, but also where only this process's sys.path has the package.
    held = "from coalign.clusters.private_ray import hold; sys.exit(hold(int(sys.argv[1])))"
    code = f"import sys; sys.path += sys.argv[2:]; {held}"
    command = [sys.executable, "-P", "-c", code, str(workers), str(Path(__file__).parents[2])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _make_private() -> None:
    """Restrict the cluster: only who has the token runs code in it, and only this machine reaches its ports.

    Raises UserError when this process has imported Ray with other settings: Ray reads them once, and would try for ever
    to reach the cluster at another address without the token.
    """
    if "ray" in sys.modules and sys.modules["ray"]._private.ray_constants.ENABLE_RAY_CLUSTER:
        raise UserError(
            "this process imported ray before coalign could restrict it to this machine; start the private cluster"
            " first, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN before the"
            " import"
        )
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's name for the choice of 127.0.0.1


def address_of(holder: subprocess.Popen[str]) -> str:
    """Return the cluster's address, host:port, once it is ready. Raises UserError when it does not start."""
    assert holder.stdout is not None
    ready, _, _ = select.select([holder.stdout], [], [], READY_SECONDS)
    line = holder.stdout.readline().strip() if ready else ""
    if line.startswith("error: "):
        raise UserError(line.removeprefix("error: "))
    if not line:
        why = f"was not ready after {READY_SECONDS:.0f} s" if not ready else "ended while it started"
        raise UserError(f"a private Ray cluster {why}; set generation.workers=0 to run without Ray")
    return line


def hold(workers: int) -> int:
    """Start a private cluster, print its address, keep it until stdin or the parent ends; return the exit status.

    At the end every process of the cluster is ended and its folder removed. So nothing outlives a step or a script,
    however that was killed.
    """
    parent = os.getppid()
    with contextlib.suppress(PermissionError):
        os.setsid()  # Ctrl-C and a closed terminal are for the parent, which then ends this process in order
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
    """Keep a cluster in a child process: a start that fails may abort the process or leave Ray in disorder there.

    Returns READY or why there was no cluster, and the child's exit status.
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
        with contextlib.suppress(BrokenPipeError):  # the reader has gone
            print(address, flush=True)
        _wait_for_end(holder)
        return 0
    except SystemExit as stop:
        return int(stop.code or 0)
    except Exception as error:  # Ray raises a bare Exception when a busy machine is too slow for it
        os.write(report, " ".join(str(error).split())[:2000].encode() or b"no reason was given")
        return 1
    finally:
        _end(folder)


def _start_ray(folder: Path, cpus: int) -> str:
    ray = import_ray()
    inside = str(folder / "r")  # Ray opens the folder that it is given to everybody; the one above stays private
    context = ray.init(address="local", _temp_dir=inside, include_dashboard=False, num_cpus=cpus, **QUIET)
    signal.signal(signal.SIGTERM, _exit_on_signal)  # Ray has installed its own handler
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
    """End the cluster in a folder: Ray's own shutdown first, for END_SECONDS at most, then what still runs there."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "ray" in sys.modules:
        shutdown = threading.Thread(target=sys.modules["ray"].shutdown, daemon=True)
        shutdown.start()
        shutdown.join(END_SECONDS)
    remove_cluster(folder)


def remove_cluster(folder: Path) -> None:
    """Kill the processes that work in a cluster's folder, then remove the folder."""
    deadline = time.monotonic() + END_SECONDS
    while (found := list(processes_in(folder))) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def processes_in(folder: Path) -> Iterator[int]:
    """Yield the ids of Ray's processes of the cluster in a folder.

    The command line of most names the folder. Ray overwrites that of workers with ray::NAME, but they have logs in the
    folder open. So has a step that is connected to the cluster, which is not one of them.
    """
    inside = f"{folder}{os.sep}"
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has ended, or belongs to somebody else
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
    """Remove the clusters whose holder was killed, with their processes; return a new folder for a cluster."""
    parent = Path(tempfile.gettempdir() if len(tempfile.gettempdir()) <= MAX_PARENT else "/tmp")
    for left in parent.glob("coalign-ray-*-*"):
        with contextlib.suppress(OSError):  # another process may be removing it as well
            if left.stat().st_uid == os.getuid() and not Path("/proc", left.name.split("-")[2]).exists():
                remove_cluster(left)
    return Path(tempfile.mkdtemp(prefix=f"coalign-ray-{os.getpid()}-", dir=parent))


if __name__ == "__main__":
    sys.exit(hold(int(sys.argv[1])))
