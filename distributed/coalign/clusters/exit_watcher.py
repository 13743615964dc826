"""Starts a process of Ray's, waits for it and writes down its exit code, which Ray itself does not tell.

The text of this file is what runs on a node, where the package may not be yet, by any Python 3: it needs the standard
library alone.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

EXIT_FILE = "COALIGN_EXIT_FILE"  # tells the process where its exit code will be


def main(arguments: list[str]) -> None:
    """Run Python with the arguments that Ray gives a process of its own; they say where Ray's logs are."""
    said = dict(word.split("=", 1) for word in arguments if "=" in word)
    command = [python_of(os.getppid()), *arguments]
    try:
        path = Path(said["--temp-dir"], said["--session-name"], "logs", f"exit-code-{os.getpid()}")
        file = path.open("w", encoding="utf-8")
    except (KeyError, OSError):
        os.execv(command[0], command)
    with file:
        own = {**os.environ, EXIT_FILE: str(path)}
        # Ray ends a process by its group, soon after it has ended by itself: this one must not be in it.
        process = subprocess.Popen(command, env=own, close_fds=False, preexec_fn=os.setpgrp)
        file.write(str(process.wait()))


def python_of(raylet: int) -> str:
    """Return the Python that Ray on this node would have started, which its own process names, or this one."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for word in Path("/proc", str(raylet), "cmdline").read_bytes().decode().split("\0"):
            if word.startswith("--python_worker_command="):
                return shlex.split(word.partition("=")[2])[0]
    return sys.executable


if __name__ == "__main__":
    main(sys.argv[1:])
