"""What is printed about an error that nobody has caught and that the machine has caused: memory, disks, files.

Imports neither torch nor an engine, and knows no step.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

from coalign.display import printable
from coalign.files import reason_of, shown

NEARLY_FULL = 1 << 20  # bytes that are free
_written: list[Path] = []  # see writes_to


def as_line(words: object) -> str:
    """Return words on one line that a terminal may show."""
    return printable(" ".join(str(words).split()))


def explain(error: Exception) -> str | None:
    """Return one line about an error that nobody has caught and that the machine has caused; None for any other."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: this module does not import torch
        return as_line(out_of_memory(error))
    if _disk_is_full(error):
        place = (error.filename if isinstance(error, OSError) else None) or _full_disk()
        return as_line(
            f"no space left on the disk of {place}; free some and run the same command again; finished work is kept"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        first = str(error).strip().partition("\n")[0]
        return as_line(f"this machine's memory is full ({first or 'MemoryError'}); use smaller values, or free some")
    if isinstance(error, OSError) and error.filename:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return as_line(f"{shown(name)}: {reason_of(error)}; check the path and who may read and write it")
    return None


def _full_disk() -> Path:
    """Return a folder on the disk that is full: where this process writes its results, unless another disk is fuller.

    What failed may have been removed meanwhile, so the first place does not have to look full any more.
    """
    places = [*_written, Path.cwd(), Path(tempfile.gettempdir())]
    for place in places:
        with contextlib.suppress(OSError):
            if shutil.disk_usage(next(p for p in (place, *place.absolute().parents) if p.exists())).free < NEARLY_FULL:
                return place
    return places[0]


def writes_to(folder: Path) -> None:
    """Remember the folder that this process writes its results to, for what is said when a disk is full."""
    _written[:] = [folder]


def out_of_memory(error: BaseException) -> str:
    """Return what to print when a GPU's memory is full.

    Of the keys that save memory only train.micro_batch_tokens is neutral: a step with work in it refuses the others.
    """
    return (
        f"the GPU's memory is full ({str(error).partition('. ')[0]}); in training, lower train.micro_batch_tokens: the"
        " step resumes, and the result stays the same; or remove the step's folder and set, in training,"
        " train.gradient_checkpointing, a higher train.zero_stage or model.lora.enabled, in generation a lower"
        " generation.batch_tokens"
    )


def _disk_is_full(error: BaseException) -> bool:
    """Return whether a full disk caused an error; safetensors and torch say so only in the message."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error) or (
        error.__context__ is not None and _disk_is_full(error.__context__)
    )
