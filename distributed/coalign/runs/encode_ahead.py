"""The token ids that a training step reads, written by the step before it: no rank waits for them while it holds a GPU.

Used by launch/paraphrase.py and launch/rank.py. Knows neither tokens nor how a step trains.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from coalign.recipe import SCRIPT, run_command
from coalign.runs.run_folder import RunFolder
from coalign.runs.step_folder import read_manifest
from coalign.steps import ENCODE

logger = logging.getLogger("coalign")

MANY_ROWS = 20_000  # fewer are encoded in the seconds that ranks need to start


def encode_ahead(recipe: Path, run: RunFolder, num_rows: int, release: Callable[[], None] = lambda: None) -> None:
    """Let a training recipe write its token ids now when there are many, and a training step of this run reads them.

    `release` is called before that begins, so that others may use the devices of this process meanwhile. A failure is
    left for the training step to meet and to report: the step that calls this is complete.
    """
    name = recipe.stem
    if num_rows < MANY_ROWS or name in run.run.inputs or read_manifest(run.step(name)) is not None:
        return
    release()
    logger.info("encoding %d rows for %s, so that its ranks need not wait", num_rows, name)
    command = [sys.executable, os.path.relpath(recipe), ENCODE, *run.arguments]
    code = run_command(command, {SCRIPT: str(os.getpid())})  # it ends when this process is killed
    if code:
        logger.warning("the rows were not encoded (exit code %d); %s will do it itself", code, name)
