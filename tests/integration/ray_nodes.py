"""A real Ray cluster of two nodes on this machine, each with a network, processes, host name and /tmp/ray of its own.

Nothing outlives the process that made it, however that ends: a node is the first process of its own process namespace,
which the kernel ends with its parent, and with it go network, mounts and everything that Ray has started. Needs root.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ADDRESSES = ("10.78.0.1", "10.78.0.2")
NAMES = ("alpha", "beta")
GCS, DASHBOARD = 6379, 8265
ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 600.0
SHARES_NOTHING = ("--net", "--uts", "--ipc", "--mount", "--pid")
_libc = ctypes.CDLL(None)


def _end_with_parent() -> None:
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def missing() -> str:
    """Return why no such cluster can be made here, or nothing."""
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"network namespaces are not permitted here: {tool} is not installed"
    probe = ["unshare", *SHARES_NOTHING, "--fork", "--mount-proc", "ip", "link", "add", "a0", "type", "veth"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"network namespaces are not permitted here: {done.stderr.strip()}" if done.returncode else ""


class Nodes:
    """Two nodes; `start` begins Ray on them, `inside` runs a command on one of them."""

    def __init__(self, folder: Path, private: Path, checkout: Path) -> None:
        self.checkout = checkout  # the working folder of commands
        self.folder = folder  # what both nodes see
        self.private = private  # an empty folder, of which each node has its own
        self.token = secrets.token_hex(32)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "COALIGN_"))} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(private),  # Ray looks for a token there
            "PYTHONPATH": str(ROOT / "distributed"),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_health_check_period_ms": "1000",  # a lost node is seen in seconds, a slow one is none
            "RAY_health_check_timeout_ms": "5000",
            "RAY_health_check_failure_threshold": "4",
            "RAY_raylet_start_wait_time_s": "300",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONUNBUFFERED": "1",
        }
        self._outer: list[subprocess.Popen[bytes]] = []
        self.inner: list[int] = []
        for name in NAMES:
            self._add(name)
        ends = [["name", "eth0", "netns", str(pid)] for pid in self.inner]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        for node, address in enumerate(ADDRESSES):
            for words in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                subprocess.run(self._enter(node, ["ip", *words.split()]), check=True)

    def _add(self, name: str) -> None:
        hosts = self.folder / "hosts"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True)))
        Path("/tmp/ray").mkdir(exist_ok=True)
        mounts = f"mount --bind {hosts} /etc/hosts"
        mounts += "".join(f" && mount -t tmpfs tmpfs {place}" for place in ("/dev/shm", "/tmp/ray", self.private))
        script = f"hostname {name} && {mounts} && echo ready && (sleep infinity & wait)"
        words = ["unshare", *SHARES_NOTHING, "--fork", "--kill-child=KILL", "--mount-proc", "bash", "-c", script]
        outer = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, preexec_fn=_end_with_parent)
        self._outer.append(outer)
        assert outer.stdout is not None and outer.stdout.readline() == b"ready\n", f"the node {name} did not start"
        (child,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        self.inner.append(int(child))

    def _enter(self, node: int, words: list[str], folder: Path | None = None) -> list[str]:
        # In another mount namespace the working folder must be named again.
        place = ["nsenter", "-t", str(self.inner[node]), *SHARES_NOTHING, f"--wd={folder or self.folder}"]
        return [*place, *words]

    def start(self, cpus: int = 2, gpus: int = 0) -> None:
        """Start Ray on both nodes."""
        common = ["--num-cpus", str(cpus), "--num-gpus", str(gpus), "--object-store-memory", str(2**27)]
        common += ["--disable-usage-stats"]
        head = ["--head", "--port", str(GCS), "--dashboard-host", ADDRESSES[0], "--dashboard-port", str(DASHBOARD)]
        self.start_node(0, [*head, *common])
        self.start_node(1, ["--address", f"{ADDRESSES[0]}:{GCS}", *common])

    def start_node(self, node: int, words: list[str]) -> None:
        """Run `ray start` on one node."""
        code, printed = self.inside(
            node, ["ray", "start", "--node-ip-address", ADDRESSES[node], *words], seconds=START_SECONDS
        )
        assert code == 0, f"ray start on {NAMES[node]}:\n{printed[-3000:]}"

    def popen(self, node: int, words: list[str], log: Path, token: str | None = None) -> subprocess.Popen[bytes]:
        """Start a command on a node as a user there would, with the cluster's token unless another is given.

        Its working folder is `checkout`.
        """
        known = {"RAY_AUTH_TOKEN": self.token if token is None else token}
        with log.open("wb") as out:  # no pipe: what `ray start` leaves behind would hold it open
            return subprocess.Popen(
                self._enter(node, words, self.checkout),
                env=self.env | known,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent,
            )

    def inside(self, node: int, words: list[str], token: str | None = None, seconds: float = 240) -> tuple[int, str]:
        """Run a command on a node; return its exit status and what it printed."""
        log = self.folder / f"{secrets.token_hex(4)}.log"
        process = self.popen(node, words, log, token)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{words} took longer than {seconds:.0f} s:\n{log.read_text()[-3000:]}") from None
        return code, log.read_text("utf-8", "replace")

    def processes(self, node: int, word: str) -> list[str]:
        """Return the command lines on a node that hold a word."""
        command = self._enter(node, ["ps", "-eo", "stat=,args="])
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        lines = [line.strip() for line in shown.stdout.splitlines()]
        return [line for line in lines if word in line and not line.startswith("Z")]

    def kill(self, node: int, word: str) -> None:
        """Kill the processes of a node whose command line begins with ray:: and a word, as soon as there are some.

        An actor has the name of its method only while one runs; between two tasks there is none to kill.
        """
        words = self._enter(node, ["pkill", "-KILL", "-f", f"^ray::{word}"])
        deadline = time.monotonic() + 30
        while subprocess.run(words, check=False).returncode != 0:
            assert time.monotonic() < deadline, f"no process of {word} runs on this node"
            time.sleep(0.05)

    def pause(self, word: str, only: int | None = None) -> None:
        """Stop such processes where they are, on both nodes or one."""
        for node in (0, 1) if only is None else (only,):
            subprocess.run(self._enter(node, ["pkill", "-STOP", "-f", f"^ray::{word}"]), check=False)

    def cut(self, node: int) -> None:
        """Pull a node's cable."""
        subprocess.run(self._enter(node, ["ip", "link", "set", "eth0", "down"]), check=True)

    def end(self) -> None:
        """End both nodes with everything on them."""
        for outer in self._outer:
            outer.kill()
        for outer in self._outer:
            outer.wait(20)
        deadline = time.monotonic() + 20
        while any(Path("/proc", str(pid)).exists() for pid in self.inner) and time.monotonic() < deadline:
            time.sleep(0.02)
