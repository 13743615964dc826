"""DeepSpeed's own launcher over two nodes, by a hostfile and ssh, as docs/running.md says; no scheduler, no Ray."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray_nodes
from commands import CONFIG, Run, assert_same_files, until
from ray_nodes import ADDRESSES, NAMES, ROOT, Nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SSHD = """HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PidFile none
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
"""
CLIENT = """Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Start two nodes that can reach each other by ssh, without a password."""
    if reason := ray_nodes.missing():
        pytest.skip(reason)
    for tool in ("sshd", "pdsh"):
        if shutil.which(tool) is None:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{tool} is not installed")
    (tmp_path / "private").mkdir()
    made = Nodes(tmp_path, tmp_path / "private", ROOT)
    try:
        folder = tmp_path / "ssh"
        (folder / "bin").mkdir(mode=0o700, parents=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
        (folder / "sshd").write_text(SSHD.format(folder=folder))
        (folder / "client").write_text(CLIENT.format(folder=folder))
        ssh = folder / "bin" / "ssh"  # instead of ~/.ssh/config
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "client"} "$@"\n')
        ssh.chmod(0o755)
        made.env["PATH"] = f"{folder / 'bin'}:{made.env['PATH']}"
        Path("/run/sshd").mkdir(exist_ok=True)
        for node, address in enumerate(ADDRESSES):
            command = [str(shutil.which("sshd")), "-f", str(folder / "sshd"), "-o", f"ListenAddress={address}"]
            code, printed = made.inside(node, command)
            assert code == 0, printed
        yield made
    finally:
        made.end()


def test_a_hostfile_trains_over_two_nodes(nodes: Nodes, finished: Run, copy_of: Callable[..., Run]) -> None:
    """Stopped by Ctrl-C it writes a checkpoint and ends on both nodes; again, it goes on to what one machine found."""
    run = copy_of("sft")
    hostfile = nodes.folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots=2\n" for name in NAMES))
    command = ["deepspeed", "--hostfile", str(hostfile), "--include", "@".join(f"{name}:1" for name in NAMES)]
    command += ["launch/sft.py", str(CONFIG.relative_to(ROOT)), *run.place]

    first = nodes.folder / "first.log"
    process = nodes.popen(0, command, first)
    until(lambda: "update 20/" in first.read_text() or process.poll() is not None, 200, first.read_text, interval=0.1)
    interrupt = ["pkill", "-INT", "-f", "bin/deepspeed --hostfile"]  # as the terminal does; nsenter hands nothing on
    assert nodes.inside(0, interrupt)[0] == 0, first.read_text()
    process.wait(100)
    training = lambda: [line for node in (0, 1) for line in nodes.processes(node, "launch/sft.py")]  # noqa: E731
    until(lambda: not training(), 60, lambda: f"left behind: {training()}\n{first.read_text()}", interval=0.5)
    assert not run.complete("sft")
    assert process.returncode not in (0, -signal.SIGKILL), first.read_text()

    code, printed = nodes.inside(0, command)
    assert code == 0, printed
    assert f"2 ranks on {', '.join(NAMES)}" in printed
    assert "resuming after update" in printed, printed
    assert run.manifest("sft")["counts"]["ranks"] == 2
    assert_same_files(run.path / "sft", finished.path / "sft", ["model/model.safetensors"])
    assert run.curve("sft") == finished.curve("sft")
