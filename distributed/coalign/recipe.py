"""The process around a recipe: exit status, logging, what it announces, commands it runs, when it stops by itself.

`run_step` is the entry point of every recipe. Imports neither torch nor an engine at the top, and knows no step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from coalign.display import printable
from coalign.errors import UserError
from coalign.failures import as_line, explain
from coalign.process import check_launcher, local_rank, rank, world_size

logger = logging.getLogger("coalign")

SCRIPT = "COALIGN_SCRIPT"  # an environment variable: the process id of the script that runs this step
USER_ERROR, INTERRUPTED, READER_GONE = 2, 130, 141  # exit status
_LAUNCHED = "RANK" in os.environ  # by a launcher, which may have started a single rank


def run_step(main: Callable[[list[str]], None]) -> None:
    """Run a recipe's main and turn its outcome into an exit status: 0 done, 2 a user error, 1 anything else.

    On many ranks one rank per node prints the user error, since each node may have its own. A requested stop (a signal,
    or rank 0's failure) leaves with its own status. 130 is Ctrl-C, and 141 means that the reader of our output left.
    """
    exit_with_script()
    try:
        try:
            check_launcher()
            main([readable_word(word) for word in sys.argv[1:]])
        finally:
            sys.stdout.flush()
        if _LAUNCHED:
            _leave(0)
    except UserError as error:
        if _is_first(local_rank):
            # One line, whatever a library has put into the message, and in one piece beside what others print.
            where = "" if _is_first(rank) else f" on {platform.node()}"
            print(f"error{where}: {as_line(error)}\n", end="", file=sys.stderr, flush=True)
        _leave(USER_ERROR)
    except SystemExit as stop:
        if not _LAUNCHED:
            raise
        if isinstance(stop.code, str) and _is_first(local_rank):
            print(stop.code, file=sys.stderr, flush=True)
        _leave(stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr, flush=True)
        _leave(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left (`--help | head`), so nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(READER_GONE)
    except Exception as error:
        words = explain(error)
        if words is None:
            raise
        logger.debug("where it happened:", exc_info=error)
        where = "" if _is_first(rank) else f" on {platform.node()}"
        print(f"error{where}: {words}", file=sys.stderr, flush=True)
        _leave(USER_ERROR)


def _is_first(number: Callable[[], int]) -> bool:
    """Return whether this rank is the first by a number of process.py's; yes where the launcher's word is no number."""
    try:
        return number() == 0
    except UserError:
        return True


def readable_word(word: str) -> str:
    """Return a word of the command line. Raises UserError, which names the key, for bytes that are not UTF-8."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = word.encode("utf-8", "backslashreplace").decode()
        key = shown.partition("=")[0] if "=" in shown else "a word"
        byte = ord(word[error.start]) & 0xFF
        raise UserError(
            f"{key} on the command line ({shown[:60]}): byte 0x{byte:02x} is not UTF-8; write it in UTF-8"
        ) from error
    return word


def _leave(status: int) -> None:
    """Exit; a rank without cleanup, since destructors of the process group may hang, or abort a finished rank."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _LAUNCHED:
        os._exit(status)
    sys.exit(status)


class _PrintableLines(logging.Formatter):
    """Messages without what a terminal would obey: they may hold names and texts from data and models."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def set_up_logging(level: str = "info") -> None:
    """Send our log to stdout, one line per message, from rank 0 (other ranks: warnings and errors)."""
    handler = logging.StreamHandler(sys.stdout)
    prefix = "" if world_size() == 1 else f"[rank {rank()}] " if rank() else ""
    handler.setFormatter(_PrintableLines(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    for noisy in ("torch", "deepspeed", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=noisy)
    logger.setLevel(level.upper() if rank() == 0 else "WARNING")


def log_lines(lines: Iterable[str]) -> None:
    """Log each line as a message."""
    for line in lines:
        logger.info("%s", line)


def announce(step: str, changed: dict[str, object], plan: str, with_model: bool = True) -> None:
    """Print what a step is about to do: settings that differ from the defaults, devices, rows or updates.

    A step without a model prints no devices, so it need not import torch to ask for them.
    """
    for key, value in changed.items():
        logger.info("  %s = %s", key, json.dumps(value))
    logger.info("%s: %s", f"{step} on {_devices()}" if with_model else step, plan)


def _devices() -> str:
    import torch

    ranks = f"{world_size()} rank{'s' if world_size() > 1 else ''}"
    if torch.cuda.is_available():
        return f"{ranks}, {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)} here"
    return f"{ranks}, CPU ({os.cpu_count()} cores)"


def progress_bar(title: str, unit: str, total: int, done: int = 0, shown: bool = True) -> Any:
    """Return a tqdm bar on stderr with `done` of `total` units; in a log it writes at most one line per 15 seconds."""
    from tqdm import tqdm

    interactive = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=title,
        unit=unit,
        mininterval=0.5 if interactive else 15.0,
        disable=not shown,
        dynamic_ncols=interactive,
    )


def run_command(command: list[str], environment: dict[str, str] | None = None) -> int:
    """Run a command, with `environment` added to its own, and return its exit status (negative: minus the signal).

    A signal to stop is passed on to the command, which may have work to save. When the command has ended, this process
    raises KeyboardInterrupt after SIGINT and SystemExit after SIGTERM or SIGUSR1.
    """
    process = subprocess.Popen(command, env=os.environ | (environment or {}))
    asked: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        if number != signal.SIGINT:  # the terminal sends Ctrl-C to the command too
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    status = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if signal.SIGINT in asked:
        raise KeyboardInterrupt
    if asked:
        raise SystemExit("stopped by a signal; run the same command again to resume")
    return status


def exit_with_script() -> None:
    """End this step when the script that runs it (launch/local.sh) was killed; SCRIPT names its process."""
    script = os.environ.get(SCRIPT, "")
    if script.isdigit():
        words = f"the script of this step (process {script}) is gone, stopping"
        _exit_when(lambda: not Path("/proc", script).exists(), words)


def exit_with_launcher() -> None:
    """End this rank when the launcher above it is gone, so that no orphan keeps writing.

    A signal that ends the `deepspeed` command orphans its helper and the ranks, so the two processes above this one are
    watched. Does nothing outside a launcher.
    """
    if "RANK" not in os.environ:
        return
    parent = os.getppid()
    # The deepspeed command starts a helper, which starts the ranks; of other launchers only the parent is watched.
    is_helper = "deepspeed.launcher" in _words_of(parent)
    grandparent = _parent_of(parent) if is_helper else 0
    _exit_when(
        lambda: os.getppid() != parent or (is_helper and _parent_of(parent) != grandparent),
        f"rank {rank()}: the launcher is gone, stopping",
    )


def exit_with_parent() -> None:
    """End this process soon after the one that started it, however that one ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def _exit_when(happened: Callable[[], bool], words: str, grace_seconds: float = 30.0) -> None:
    """Watch in a thread: when it has happened send this process SIGTERM, and end it `grace_seconds` later.

    A rank in its training loop needs that time for a checkpoint: SIGTERM to a whole job ends the launcher at once.
    """

    def watch() -> None:
        while not happened():
            time.sleep(1.0)
        print(words, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)  # Preemption catches it; otherwise it ends this process
        time.sleep(grace_seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name=words.partition(" ")[0]).start()


def _parent_of(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def _words_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
