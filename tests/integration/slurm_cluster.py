"""A real Slurm cluster for tests, on one machine: nodes are namespaces with own network, host name, PIDs and /tmp.

A process of its own holds it. When the test session ends, in whatever way, the pipe to the holder ends, and it ends the
daemons and removes namespaces. A holder that is killed takes the daemons with it; the next one removes the rest.
Needs root, munge, slurmctld, slurmd and iproute2; no systemd, no cgroups.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "salloc", "srun", "scontrol", "squeue", "ip", "unshare")
NODES = ("n1", "n2")
PREFIX = "cslurm"  # of network namespaces: PREFIX, the holder's process, c (the controller) or n and the node's number
CPUS, GPUS = 8, 2  # what each node says that it has
CONTROLLER_PORT, NODE_PORT = 16817, 16818
START_SECONDS, END_SECONDS = 120.0, 20.0
SBIN = ":/usr/sbin:/sbin"
PR_SET_PDEATHSIG = 1

SLURM_CONF = """\
ClusterName=coalign
SlurmctldHost={host}({net}.254)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PriorityType=priority/basic
JobRequeue=1
ReturnToService=2
SlurmdTimeout=5
MessageTimeout=30
TCPTimeout=5
KillWait=10
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=2:00:00 PriorityTier=1 GraceTime=120 State=UP
PartitionName=urgent Nodes=ALL MaxTime=2:00:00 PriorityTier=2 PreemptMode=OFF State=UP
"""


def missing() -> str | None:
    """Return why no cluster can be started here, or None."""
    path = os.environ.get("PATH", "") + SBIN
    gone = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if gone:
        return f"Slurm is not installed: no {', '.join(gone)} (apt-get install slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "Slurm is not installed for tests: a cluster in namespaces needs root"
    return None


def environment(root: Path) -> dict[str, str]:
    """Return the environment of daemons and client commands."""
    strange = ("SLURM", "SBATCH", "SRUN", "TORCHINDUCTOR")  # the last is what torch has set in this process
    own = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    own["PATH"] = own.get("PATH", "") + SBIN
    return own | {"SLURM_CONF": str(root / "slurm.conf")}


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, even by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Holder:
    """Starts the daemons, obeys `kill NODE` and `start NODE` on its input, and takes everything down at its end."""

    def __init__(self, root: Path, shared: list[Path]) -> None:
        self.root, self.shared = root, [*shared, root]
        self.tag = f"{PREFIX}{os.getpid()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.env = environment(root)

    def namespace(self, name: str) -> str:
        """Return the network namespace of a node, or of the controller (c)."""
        return self.tag + name

    def run(self) -> None:
        """Hold the cluster until the input ends."""
        try:
            self.write_files()
            self.start()
            print(f"ready {self.namespace('c')}", flush=True)
            for line in sys.stdin:
                command, node = line.split()
                {"kill": self.kill_node, "start": self.start_node}[command](node)
                print("done", flush=True)
        finally:
            self.stop()

    def write_files(self) -> None:
        """Write the configuration, a munge key, and devices that stand for GPUs (any character device will do)."""
        root = self.root
        for name in ("state", "spool", "log", "munge", "dev", *(f"tmp/{node}" for node in NODES)):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "munge").chmod(0o700)
        (root / "munge" / "key").write_bytes(secrets.token_bytes(1024))
        (root / "munge" / "key").chmod(0o400)
        for i in range(GPUS):
            (root / "dev" / f"nvidia{i}").symlink_to("/dev/null")
        net, host = "10.79.0", socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr={net}.{i} Port={NODE_PORT} CPUs={CPUS} RealMemory=8000"
            f" Gres=gpu:{GPUS} State=UNKNOWN"
            for i, node in enumerate(NODES, 1)
        ]
        values = {"root": root, "host": host, "net": net, "controller_port": CONTROLLER_PORT, "nodes": "\n".join(nodes)}
        (root / "slurm.conf").write_text(SLURM_CONF.format(**values))
        gpus = f"Name=gpu Flags=nvidia_gpu_env File={root}/dev/nvidia[0-{GPUS - 1}]"
        (root / "gres.conf").write_text("AutoDetect=off\n" + "".join(f"NodeName={node} {gpus}\n" for node in NODES))
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = [f"{net}.254 {host}", *(f"{net}.{i} {node}" for i, node in enumerate(NODES, 1))]
        (root / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))

    def start(self) -> None:
        """Start munge, the network, the controller and the nodes."""
        munge = self.root / "munge"
        places = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self.spawn("munged", ["munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *places])
        controller = self.namespace("c")
        ip("netns", "add", controller)
        ip("-n", controller, "link", "set", "lo", "up")
        ip("-n", controller, "link", "add", "bridge", "type", "bridge")
        ip("-n", controller, "addr", "add", "10.79.0.254/24", "dev", "bridge")
        ip("-n", controller, "link", "set", "bridge", "up")
        etc = Path("/etc/netns", controller)  # `ip netns exec` lays these files over those in /etc
        etc.mkdir(parents=True)
        shutil.copy(self.root / "hosts", etc / "hosts")
        for i, node in enumerate(NODES, 1):
            name = self.namespace(node)
            ip("netns", "add", name)
            ip("-n", controller, "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", controller, "link", "set", node, "master", "bridge", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"10.79.0.{i}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        wait_until((munge / "socket").exists, "munged opens its socket")
        self.spawn("slurmctld", ["ip", "netns", "exec", controller, "slurmctld", "-D"])
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start a node, unless it is up: namespaces of its own, in which a shell is process 1, and slurmd in them."""
        if node in self.processes:
            return
        tmp = self.root / "tmp" / node
        lines = [f"hostname {node}", f"mount --bind {self.root}/hosts /etc/hosts", "mount -t tmpfs tmpfs /dev/shm"]
        for folder in self.shared:  # those below /tmp are seen in the node's own /tmp as well
            if folder.is_relative_to("/tmp"):
                inside = tmp / folder.relative_to("/tmp")
                lines += [f"mkdir -p {inside}", f"mount --bind {folder} {inside}"]
        lines += [f"mount --rbind {tmp} /tmp", f"slurmd -D -N {node} & wait $!"]
        own = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        self.spawn(node, ["ip", "netns", "exec", self.namespace(node), *own, "bash", "-c", "\n".join(lines)])

    def kill_node(self, node: str) -> None:
        """End a node as if its power went: all of its processes die at once."""
        process = self.processes.pop(node)
        process.kill()  # --kill-child takes the whole PID namespace along
        process.wait(END_SECONDS)

    def spawn(self, name: str, command: list[str]) -> None:
        """Start a daemon that cannot outlive this process."""
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=self.root,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def stop(self) -> None:
        """End the daemons and remove the namespaces."""
        for name in (*NODES, "slurmctld", "munged"):
            if process := self.processes.pop(name, None):
                process.kill()
                process.wait(END_SECONDS)
        for name in (*NODES, "c"):
            remove_namespace(self.namespace(name))


def ip(*words: str) -> None:
    """Run `ip`; raise with what it says."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def remove_namespace(name: str) -> None:
    """Kill what runs in a network namespace and remove it."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    for process in found.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def remove_leftovers() -> None:
    """Remove the namespaces of holders that were killed."""
    for path in Path("/run/netns").glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX).partition("c")[0].partition("n")[0]
        if not Path("/proc", number).exists():
            remove_namespace(path.name)


def wait_until(happened: Callable[[], object], what: str, seconds: float = START_SECONDS) -> None:
    """Poll until a function returns something true; raise with `what` was awaited."""
    deadline, interval = time.monotonic() + seconds, 0.05
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(interval)
        interval = min(0.5, 1.2 * interval)  # asking Slurm takes processor time that the jobs want


class SlurmCluster:
    """The test's side: client commands on the login node, jobs to wait for, nodes to kill."""

    def __init__(self, root: Path, shared: list[Path]) -> None:
        self.root, self.env = root, environment(root)
        command = [sys.executable, __file__, str(root), *map(str, shared)]
        self.holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        answer = self._answer()
        if not answer.startswith("ready "):
            raise RuntimeError(f"the cluster did not start: {answer or 'the holder ended'}")
        self.namespace = answer.split()[1]
        self.wait_for_nodes(*NODES)

    def _answer(self) -> str:
        assert self.holder.stdout is not None
        return self.holder.stdout.readline().strip()

    def _tell(self, words: str) -> None:
        assert self.holder.stdin is not None
        self.holder.stdin.write(f"{words}\n")
        self.holder.stdin.flush()
        assert self._answer() == "done", words

    def stop(self) -> None:
        """End the cluster."""
        assert self.holder.stdin is not None
        self.holder.stdin.close()
        self.holder.wait(4 * END_SECONDS)

    def on_login_node(self, words: list[str]) -> list[str]:
        """Return a command as it is run where the controller is."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def run(
        self, *words: str, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a client command to its end."""
        return subprocess.run(
            self.on_login_node(list(words)),
            cwd=cwd or self.root,
            env=self.env | (env or {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def wait_for_nodes(self, *names: str, state: str = "idle") -> None:
        """Wait until nodes are in a state."""

        def ready() -> bool:
            lines = self.run("sinfo", "-h", "-N", "-o", "%N %T").stdout.split("\n")
            return {*names} <= {line.split()[0] for line in lines if line.endswith(f" {state}")}

        wait_until(ready, f"{names} {state}; {self.run('sinfo', '-N').stdout}")

    def kill_node(self, name: str) -> None:
        """Take a node's power away."""
        self._tell(f"kill {name}")

    def start_node(self, name: str) -> None:
        """Give a node its power back."""
        self._tell(f"start {name}")

    def job(self, number: str) -> dict[str, str]:
        """Return what scontrol says of a job."""
        words = self.run("scontrol", "show", "job", "-o", number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, number: str, *states: str, seconds: float = 300.0) -> dict[str, str]:
        """Wait until a job is in one of the states and return what scontrol says of it."""
        found: dict[str, str] = {}

        def there() -> bool:
            found.clear()
            found.update(self.job(number))
            return found.get("JobState") in states

        wait_until(there, f"job {number} {states}, last {found}", seconds)
        return found

    def start_now(self, number: str, restarts: int) -> None:
        """Wait until a job was queued again, and lift the two minutes that Slurm then lets pass."""
        self.wait_until_queued_again(number, restarts)
        time.sleep(2.0)  # in the same second the job's new credential would count as revoked
        done = self.run("scontrol", "update", f"JobId={number}", "StartTime=now")
        assert done.returncode == 0, done.stderr

    def wait_until_queued_again(self, number: str, restarts: int) -> None:
        """Wait until a job waits to be started for so many times more."""
        wait_until(lambda: self._queued_again(number, restarts), f"job {number} queued again: {self.job(number)}")

    def _queued_again(self, number: str, restarts: int) -> bool:
        found = self.job(number)
        return found.get("JobState") == "PENDING" and int(found.get("Restarts", "0")) >= restarts


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C means the test session, which then closes the pipe
    remove_leftovers()
    Holder(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]]).run()
