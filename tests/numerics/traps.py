"""Checkpoints into which somebody has put a pickle that runs code when it is opened, with digests that fit it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from coalign.runs.digests import digest_file
from coalign.training.checkpoints import CHECKPOINT_META


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def set_trap(checkpoint: Path, pattern: str, sprung: Path, bare: bool = False) -> None:
    """Replace one file of a checkpoint by a trap that creates `sprung`: in torch's form, or a bare pickle.

    It is tried once, so that a trap that does nothing is no proof.
    """
    path = sorted(checkpoint.glob(pattern))[0]
    if bare:
        path.write_bytes(pickle.dumps(Trap(sprung)))
        pickle.loads(path.read_bytes())
    else:
        torch.save({"module": torch.zeros(1), "optimizer_state_dict": Trap(sprung)}, path)
        torch.load(path, weights_only=False)
    sprung.unlink()
    meta = json.loads((checkpoint / CHECKPOINT_META).read_text("utf-8"))
    meta["files"][path.name] = digest_file(path)
    (checkpoint / CHECKPOINT_META).write_text(json.dumps(meta), "utf-8")
