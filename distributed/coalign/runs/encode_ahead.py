"""The token ids that a training step reads, written by the step before it, so that no rank waits while holding a GPU.

Knows neither tokens nor how a step trains.
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
    """Run a training recipe with ENCODE, which writes its token ids, when this run still has to train on many rows.

    `release` is called first, to free the devices of this process. A failure is only logged, since the calling step is
    complete: the training step will meet it again and report it.
    """
    name = recipe.stem
    if num_rows < MANY_ROWS or name in run.run.inputs or read_manifest(run.step(name)) is not None:
        return
    release()
    logger.info("encoding %d rows for %s, so that its ranks need not wait for them", num_rows, name)
    command = [sys.executable, os.path.relpath(recipe), ENCODE, *run.arguments]
    status = run_command(command, {SCRIPT: str(os.getpid())})  # it ends when this process is killed
    if status:
        logger.warning("the rows were not encoded (exit status %d); %s will encode them itself", status, name)
