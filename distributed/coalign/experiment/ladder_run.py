"""Running a ladder: every step that is not complete, in order, with the progress and the time that is left.

Starts commands; computes nothing. Which steps there are is in ladder.py.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from coalign.commandline import parse_command_line
from coalign.config_values import table_values
from coalign.experiment.ladder import Ladder, StepRun, is_current, remaining_seconds
from coalign.recipe import run_command
from coalign.runs.digests import digest_file, digest_model_files
from coalign.runs.run_folder import RunFolder
from coalign.runs.step_folder import read_manifest
from coalign.steps import STEP_TABLES

ALWAYS_STARTED = ("prepare", "paraphrase")  # they check themselves whether the files that they read have changed
Command = Callable[[str, list[str]], list[str]]  # (step, its words) -> the command that runs it


def run_all(ladder: Ladder, steps: list[StepRun], words: list[str], command: Command) -> None:
    """Run every step that is not complete, in order, as a command of its own; print the progress.

    `words` are common to all steps. Raises SystemExit with the exit status of the first step that fails.
    """
    started, parent = time.monotonic(), os.getppid()
    done: list[tuple[str, float]] = []
    for index, run in enumerate(steps):
        own = run.words(words)
        config = parse_command_line(run.step, own)
        settings = table_values(config, STEP_TABLES[run.step], with_neutral=False)
        folder = RunFolder(config.run, own)
        files = digest_model_files(config.model)
        if Path(config.sft.replay).is_file():
            files["sft.replay"] = digest_file(Path(config.sft.replay))
        current = is_current(run.folder, settings, folder, files, config.eval.models)
        if current and run.step not in ALWAYS_STARTED:
            continue
        todo = [r.step for r in steps[index:] if read_manifest(r.folder) is None]
        left = remaining_seconds(done, todo)
        spent = f"{(time.monotonic() - started) / 60:.0f} min so far"
        estimate = "" if left is None else f", about {left / 60:.0f} min left"
        title, begun, words_of_step = run.title(ladder.arms), time.monotonic(), command(run.step, own)
        print(f"== step {index + 1} of {len(steps)}: {title} ({spent}{estimate})", flush=True)
        status = run_command(words_of_step)
        if status:
            what_next = f"fix the error and run the same command again. The step alone: {shlex.join(words_of_step)}"
            print(f"ladder: {title} failed (exit status {status}); {what_next}", file=sys.stderr)
            raise SystemExit(status if status > 0 else 128 - status)
        if not current:
            done.append((run.step, time.monotonic() - begun))
        if os.getppid() != parent:
            raise SystemExit("the command that started this one is gone; run it again to resume")
