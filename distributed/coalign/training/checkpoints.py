"""Checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from coalign.process import rank
from coalign.runs.digests import digest_file
from coalign.training.engine import Engine

logger = logging.getLogger("coalign")


CHECKPOINT_META = "checkpoint.json"


def _resume(engine: Engine, folder: Path) -> dict[str, Any]:
    """Load the newest checkpoint whose files are all whole and return its state; say which were passed over."""
    for checkpoint in sorted((folder / "checkpoints").glob("step_*"), reverse=True):
        complaint = _complaint(checkpoint)
        if engine.mean([float(complaint is not None)])[0] > 0:
            logger.warning("checkpoint %s is passed over: %s", checkpoint, complaint or "not whole on another rank")
            continue
        state = engine.restore(checkpoint)
        logger.info("resuming after update %d from %s", state["step"], checkpoint)
        return state
    return {"step": 0, "tokens": 0.0, "first_measure": None, "p_best": []}


def _complaint(checkpoint: Path) -> str | None:
    try:
        meta = json.loads((checkpoint / CHECKPOINT_META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{CHECKPOINT_META} is missing or cut short"
    if rank() != 0:
        return None  # one reader is enough to digest the files
    for name, digest in meta["files"].items():
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if digest_file(path) != digest:
            return f"{name} is damaged"
    return None


def _rotate(newest: Path, keep_last: int) -> None:
    """Remove all but the newest checkpoints; called after `newest` was written and digested.

    What lies beyond it was passed over as damaged, and is removed too.
    """
    if rank() == 0:
        found = sorted(newest.parent.glob("step_*"))
        kept = [path for path in found if path.name <= newest.name][-keep_last:]
        for old in found:
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)
