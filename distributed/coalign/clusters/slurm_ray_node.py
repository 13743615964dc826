"""One node of the private Ray cluster of a Slurm job: starts Ray there, keeps it running, ends it with its folder.

    python -m coalign.clusters.slurm_ray_node     # slurm/ray.sbatch runs this once per node

The environment holds the token. Knows no step.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from coalign.clusters.private_ray import START_ATTEMPTS, remove_cluster
from coalign.clusters.ray_connection import node_resource
from coalign.clusters.slurm_node import count_gpus, job_port, own_address
from coalign.errors import UserError
from coalign.process import node_names, start_seconds

HOLDER = "holder"  # file in a cluster's folder with the id of the process that keeps it
LOG_LINES = 40
FOLDERS = "coalign-job*.ray"  # in /tmp, since Ray's sockets have long paths; every node has the same folder


class _JobIsOverError(Exception):
    """A signal has said that the job is over."""


def main() -> int:
    """Keep this node's part of the cluster until the job ends it; return the exit status."""
    for number in (signal.SIGTERM, signal.SIGUSR2):  # from Slurm, from the job script
        signal.signal(number, _end)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # meant for the job script
    names = node_names()
    name = names[int(os.environ["SLURM_NODEID"])]
    remove_leftovers()
    folder = Path(f"{os.environ['COALIGN_TMP']}.ray")
    try:
        for _ in range(START_ATTEMPTS):
            folder.mkdir(mode=0o700)
            (folder / HOLDER).write_text(str(os.getpid()))
            patience = {"RAY_gcs_server_port_wait_time_s": f"{start_seconds():.0f}"}  # Ray's own limit is 20 s
            patience |= own_places(folder, int(os.environ["SLURM_JOB_ID"]))
            command = start_command(names, name, folder)
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=os.environ | patience)
            started = time.monotonic()
            print(f"Ray has ended on {name} (exit status {process.wait()})\n{last_words(folder)}", flush=True)
            if time.monotonic() - started > start_seconds():
                break  # it had been running
            remove_cluster(folder)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except _JobIsOverError:
        return 0
    finally:
        remove_cluster(folder)


def _end(number: int, frame: FrameType | None) -> None:
    for other in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(other, signal.SIG_IGN)  # they may come several times
    raise _JobIsOverError


def own_places(folder: Path, job: int) -> dict[str, str]:
    """Return the variables that give this job its own metrics ports and compiler caches, beside other jobs' here."""
    ports = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")
    places = {name: str(job_port(job, index)) for index, name in enumerate(ports, 3)}
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        places[name] = os.environ.get(name) or str(folder / name.partition("_")[0].lower())
    return places


def start_command(names: list[str], name: str, folder: Path) -> list[str]:
    """Return the command that starts Ray on this node and stays. Nodes other than the first wait for the head here.

    No port is fixed: the head's comes from the job, ports that could collide are free ones, Ray chooses the others.
    Raises UserError when the head does not listen in time.
    """
    address = os.environ["RAY_ADDRESS"]
    host, _, port = address.rpartition(":")
    job = int(os.environ["SLURM_JOB_ID"])
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += [f"--num-cpus={os.environ.get('SLURM_CPUS_ON_NODE', '1')}", f"--num-gpus={count_gpus()}"]
    command += [f"--resources={json.dumps({node_resource(name): 1})}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={job_port(job, 1)}"]
    if name == names[0]:
        command += ["--head", f"--port={port}", f"--node-ip-address={host}", f"--temp-dir={folder / 'r'}"]
        return [*command, "--include-dashboard=false", f"--ray-client-server-port={job_port(job, 2)}"]
    wait_for_head(host, int(port), names[0], name)
    return [*command, f"--address={address}", f"--node-ip-address={own_address(names)}"]


def last_words(folder: Path) -> str:
    """Return the last lines that Ray's daemons have logged, before the folder is removed."""
    lines = []
    for path in sorted((folder / "r").glob("session_2*/logs/*")):
        if path.name.startswith(("raylet.", "gcs_server.")) and path.stat().st_size:
            lines += [f"-- {path.name}", *path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]]
    return "\n".join(lines)


def wait_for_head(host: str, port: int, head: str, name: str) -> None:
    """Return when the head listens. Raises UserError, which names both nodes, after slurm.start_seconds."""
    deadline = time.monotonic() + start_seconds()
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5.0):
            return
        time.sleep(0.2)
    raise UserError(
        f"{name} can't reach Ray's head on {head} at {host}:{port} within {start_seconds():.0f} s; see that node's log,"
        " and whether a firewall is between them"
    )


def remove_leftovers() -> None:
    """End and remove what killed jobs of this user have left on this node."""
    for folder in Path("/tmp").glob(FOLDERS):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid() and not Path("/proc", (folder / HOLDER).read_text()).exists():
                remove_cluster(folder)


if __name__ == "__main__":
    sys.exit(main())
