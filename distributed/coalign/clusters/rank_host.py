"""The training ranks of one node of a Ray cluster, as processes of an actor: started, read, signalled, ended.

A rank is the command that a launcher would start. Knows neither the other nodes nor what a rank computes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

from coalign.clusters.postmortem import ProcessPlace, count_oom_kills, here
from coalign.process import free_port

POLL_SECONDS = 1.0
LONELY_SECONDS = 40.0  # without a poll from the driver, which counts this node as lost by then, or soon will
SIOCGIFADDR = 0x8915  # Linux's ioctl for the address of an interface


class Host:
    """An actor with the ranks of its node as processes, which end when it ends."""

    def __init__(self, folder: str) -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._ranks: list[subprocess.Popen[str]] = []
        self._lines: deque[tuple[int, str]] = deque()
        self._readers: list[threading.Thread] = []
        self._kills = count_oom_kills()
        self._asked = time.monotonic()

    def meet(self) -> tuple[ProcessPlace, str, int]:
        """Return this process's place, its node's IP address in the cluster, and a port that is free on the node."""
        from coalign.clusters.private_ray import import_ray

        return here(), import_ray().util.get_node_ip_address(), free_port()

    def start(self, command: tuple[str, ...], environments: list[dict[str, str]], address: str) -> str:
        """Start one rank per environment, which holds RANK and the like; return why that is impossible, or "".

        `address` is this node's IPv4 address, through whose interface gloo connects.
        """
        if not Path(command[0]).is_file():
            return f"{Path(command[0]).absolute()} is not there"
        own = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": _search_path()}
        interface = _interface_of(address)
        if interface:  # else gloo takes the host name's address, which may be a loopback
            own["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", interface)
        for environment in environments:
            process = subprocess.Popen(
                [sys.executable, *command],
                env=os.environ | own | environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            self._ranks.append(process)
            reader = threading.Thread(target=self._read, args=(int(environment["RANK"]), process), daemon=True)
            reader.start()
            self._readers.append(reader)
        self._asked = time.monotonic()
        threading.Thread(target=self._end_when_lonely, daemon=True).start()
        return ""

    def _end_when_lonely(self) -> None:
        """Kill the ranks when the driver has not polled for long: it restarts them elsewhere; two must not write."""
        while time.monotonic() - self._asked < LONELY_SECONDS:
            if all(process.poll() is not None for process in self._ranks):
                return
            time.sleep(POLL_SECONDS)
        self.end()

    def _read(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.append((number, line.rstrip("\n")))

    def poll(self) -> tuple[list[tuple[int, str]], list[int | None], bool]:
        """Return what the ranks have printed since, their exit statuses, and whether memory ran out on this node.

        A line comes as (rank, text); a rank that runs has the status None. Returns at once when there is something to
        report, else after POLL_SECONDS.
        """
        self._asked = time.monotonic()
        deadline = self._asked + POLL_SECONDS
        codes = [process.poll() for process in self._ranks]
        while not self._lines and None in codes and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [process.poll() for process in self._ranks]
        for reader, code in zip(self._readers, codes, strict=True):
            if code is not None:
                reader.join(5.0)  # its last lines; a process that it left behind may keep the pipe open
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        return lines, codes, count_oom_kills() > self._kills

    def signal(self, number: int) -> None:
        """Send a signal to the ranks that run."""
        for process in self._ranks:
            if process.poll() is None:
                process.send_signal(number)

    def end(self) -> None:
        """Kill the ranks and wait until they are gone."""
        self.signal(signal.SIGKILL)
        for process in self._ranks:
            process.wait()


def _search_path() -> str:
    """Return a rank's PYTHONPATH: first the folder of this package, which Ray may have unpacked for the job."""
    own = str(Path(__file__).parents[2])
    return os.pathsep.join(dict.fromkeys([own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))


def _interface_of(address: str) -> str:
    """Return the name of the network interface that has an IPv4 address; "" when none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return ""
