"""Starts a process of Ray's, waits for it and writes down its exit code, which Ray itself does not tell.

The text of this file is what runs on a node, where the package may not be yet: it needs the standard library alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXIT_FILE = "COALIGN_EXIT_FILE"  # tells the process where its exit code will be


def main(arguments: list[str]) -> None:
    """Run Python with the arguments that Ray gives a process of its own; they say where Ray's logs are."""
    said = dict(word.split("=", 1) for word in arguments if "=" in word)
    command = [sys.executable, *arguments]
    try:
        path = Path(said["--temp-dir"], said["--session-name"], "logs", f"exit-code-{os.getpid()}")
        file = path.open("w", encoding="utf-8")
    except (KeyError, OSError):
        os.execv(sys.executable, command)
    with file:
        # Ray ends a process by its group, soon after it has ended by itself: this one must not be in it.
        process = subprocess.Popen(command, env=os.environ | {EXIT_FILE: str(path)}, close_fds=False, process_group=0)
        file.write(str(process.wait()))


if __name__ == "__main__":
    main(sys.argv[1:])
