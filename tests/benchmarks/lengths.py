"""The stored lengths of real prompts and answers (lengths.json, written by make_lengths.py). Knows no torch."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("lengths.json")


@functools.cache
def lengths() -> dict[str, Any]:
    """Return the stored lengths: for each training task, histograms as the lengths in the middle of equal bins."""
    found: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return found
