"""Starts a process for Ray, waits for it and writes its exit status to a file, since Ray itself does not report it.

A node runs the text of this file, under any Python 3, before the package may be there. So it needs the standard library
alone.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

EXIT_FILE = "COALIGN_EXIT_FILE"  # the process finds here which file will hold its exit status


def main(arguments: list[str]) -> None:
    """Run Python with the arguments that Ray gives to its processes; they also name the folder of Ray's logs."""
    said = dict(word.split("=", 1) for word in arguments if "=" in word)
    command = [python_of(os.getppid()), *arguments]
    try:
        path = Path(said["--temp-dir"], said["--session-name"], "logs", f"exit-code-{os.getpid()}")
        file = path.open("w", encoding="utf-8")
    except (KeyError, OSError):
        os.execv(command[0], command)
    with file:
        own = {**os.environ, EXIT_FILE: str(path)}
        # Ray kills the process group of a process that has ended. A group of its own for it spares this watcher.
        process = subprocess.Popen(command, env=own, close_fds=False, preexec_fn=os.setpgrp)
        file.write(str(process.wait()))


def python_of(raylet: int) -> str:
    """Return the Python that the raylet's command line names, which Ray would have started; else this one."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for word in Path("/proc", str(raylet), "cmdline").read_bytes().decode().split("\0"):
            if word.startswith("--python_worker_command="):
                return shlex.split(word.partition("=")[2])[0]
    return sys.executable


if __name__ == "__main__":
    main(sys.argv[1:])
