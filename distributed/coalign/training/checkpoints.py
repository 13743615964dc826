"""The checkpoints of a training step: where they lie, what describes them, how a run resumes, which are removed.

A checkpoint is a folder checkpoints/step_000123, named after the number of updates made. Beside the engine's own files
it holds checkpoint.json: the state of the loop, how the ranks shared the weights, and a digest of every file.
Knows the Engine protocol, no DeepSpeed.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coalign.errors import UserError
from coalign.files import read_json
from coalign.process import rank, world_size
from coalign.runs.atomic_files import write_json
from coalign.runs.digests import digest_file
from coalign.training.engine import Engine

logger = logging.getLogger("coalign")

CHECKPOINT_META = "checkpoint.json"


@dataclasses.dataclass
class TrainingState:
    """What the loop remembers between updates, beside weights and optimizer.

    `step` counts the updates made and `tokens` the tokens trained on. `first_measure` is the dev measurement before the
    first update. `p_best` holds the best responses' mean log-prob per token in the first and in the latest updates.
    """

    step: int = 0
    tokens: float = 0.0
    first_measure: dict[str, float] | None = None
    p_best: list[float] = dataclasses.field(default_factory=list)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return where the checkpoint after `step` updates lies in a training step's folder."""
    return folder / "checkpoints" / f"step_{step:06d}"


def has_checkpoint(folder: Path) -> bool:
    """Return whether a training step's folder holds a checkpoint, whole or damaged."""
    return any((folder / "checkpoints").glob("step_*"))


def write_checkpoint_meta(folder: Path, state: dict[str, Any], zero_stage: int) -> None:
    """Describe a checkpoint whose other files are all written; called by rank 0 alone."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    meta = {
        "state": state,
        "world_size": world_size(),
        "zero_stage": zero_stage,
        "files": {str(path.relative_to(folder)): digest_file(path) for path in files},
    }
    write_json(folder / CHECKPOINT_META, meta)


def read_checkpoint_meta(folder: Path) -> dict[str, Any]:
    """Return what `write_checkpoint_meta` wrote. Raises UserError when it is missing or damaged."""
    path = folder / CHECKPOINT_META
    meta = read_json(path)
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict) or not isinstance(meta.get("files"), dict):
        raise UserError(f"{path} is damaged")
    if not all(type(meta.get(key)) is int for key in ("world_size", "zero_stage")):
        raise UserError(f"{path} is damaged")
    if not _is_state(meta["state"]) or not all(isinstance(digest, str) for digest in meta["files"].values()):
        raise UserError(f"{path} is damaged")
    if any(".." in Path(name).parts or Path(name).is_absolute() for name in meta["files"]):
        raise UserError(f"{path} names files of other folders")
    return meta


def _is_state(state: dict[str, Any]) -> bool:
    """Return whether a JSON object has the keys and types of TrainingState, of which older versions may lack some."""
    first = state.get("first_measure") or {}
    return (
        state.keys() <= {field.name for field in dataclasses.fields(TrainingState)}
        and type(state.get("step")) is int
        and _are_numbers([state.get("tokens", 0.0)])
        and isinstance(first, dict)
        and _are_numbers(first.values())
        and isinstance(state.get("p_best", []), list)
        and _are_numbers(state.get("p_best", []))
    )


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(type(value) in (int, float) for value in values)


def resume(engine: Engine, folder: Path) -> TrainingState:
    """Load the newest checkpoint whose files are all whole and return its state, or the state of a new run.

    Logs which damaged checkpoints are passed over. Called by every rank.
    """
    for checkpoint in sorted((folder / "checkpoints").glob("step_*"), reverse=True):
        complaint = complaint_of_checkpoint(checkpoint)
        if engine.mean([float(complaint is not None)])[0] > 0:
            logger.warning("checkpoint %s is passed over: %s", checkpoint, complaint or "damaged for another rank")
            continue
        state = TrainingState(**engine.restore(checkpoint))
        logger.info("resuming after update %d from %s", state.step, checkpoint)
        return state
    return TrainingState()


def complaint_of_checkpoint(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None. Only rank 0 computes digests."""
    try:
        meta = read_checkpoint_meta(checkpoint)
    except UserError:
        return f"{CHECKPOINT_META} is missing or damaged"
    if rank() != 0:
        return None
    for name, digest in meta["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if digest_file(path) != digest:
            return f"{name} is damaged"
    return None


def save(engine: Engine, folder: Path, state: TrainingState, keep_last: int) -> None:
    """Write the checkpoint of a state and remove all but the newest `keep_last`; called by every rank."""
    checkpoint = checkpoint_folder(folder, state.step)
    engine.save(checkpoint, dataclasses.asdict(state))
    rotate(checkpoint, keep_last)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, or whatever lies in its place."""
    if checkpoint.is_file() or checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        shutil.rmtree(checkpoint, ignore_errors=True)


def rotate(newest: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints; called after `newest` was written and digested.

    A checkpoint later than `newest` was passed over as damaged, and is removed too.
    """
    if rank() == 0:
        found = sorted(newest.parent.glob("step_*"))
        kept = [path for path in found if path.name <= newest.name][-keep_last:]
        for old in found:
            if old not in kept:
                remove(old)
