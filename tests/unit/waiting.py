"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

LIMIT_SECONDS = 60.0


def until(happened: Callable[[], bool]) -> None:
    """Return when something has happened; fail when it takes too long."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)
