"""Regular expressions that come from files of wordings: compiled and matched within limits.

A pattern such as (\\w+\\s?)+! tries every way to divide a text that it does not match, which may take years. Knows no
wordings.
"""

from __future__ import annotations

import functools
import re
import signal
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

MAX_LENGTH = 10_000  # characters of a pattern
MAX_SECONDS = 1.0  # of CPU time for one match, which takes microseconds where nothing is wrong


class PatternError(ValueError):
    """What is wrong with a regular expression, as a predicate: "takes over 1 s"."""


class _OutOfTimeError(Exception):
    pass


@functools.cache
def compile_pattern(regex: str) -> re.Pattern[str]:
    """Return a compiled regular expression. Raises PatternError for one that Python refuses, whatever its reason."""
    if len(regex) > MAX_LENGTH:
        raise PatternError(f"has {len(regex)} characters, and {MAX_LENGTH} are the most")
    try:
        with warnings.catch_warnings(), _limited():
            warnings.simplefilter("ignore")
            return re.compile(regex)
    except _OutOfTimeError as error:
        raise PatternError(f"takes over {MAX_SECONDS:g} s to compile; write a simpler one") from error
    # Beside re.error: OverflowError for a huge repeat, RecursionError for deep brackets, and what later versions add.
    except Exception as error:
        raise PatternError(f"is no regular expression: {error}") from error


@functools.lru_cache(maxsize=64)
def match_fields(regex: str, text: str) -> dict[str, str] | None:
    """Return the named groups of a match at the beginning of a text ("" for a group that took no part), or None.

    An input is rendered, mapped there and mapped back by one pattern, so the last results are kept; they are not to be
    changed. Raises PatternError for an invalid pattern, and when the match takes over MAX_SECONDS.
    """
    pattern = compile_pattern(regex)
    try:
        with _limited():
            match = pattern.match(text)
    except _OutOfTimeError as error:
        raise PatternError(
            f"takes over {MAX_SECONDS:g} s on the input {text[:60]!r}; avoid a repeat inside a repeat, such as"
            r" (\w+\s?)+, for example by (\w+\s)*\w+"
        ) from error
    return None if match is None else match.groupdict(default="")


@contextmanager
def _limited() -> Iterator[None]:
    """Raise _OutOfTimeError in the main thread after MAX_SECONDS of CPU time; re looks for signals while it matches.

    CPU time, so that a busy machine changes nothing. Another thread can't be interrupted so, and has no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGVTALRM) is not _stop:  # it stays installed, since each call of the system costs
        signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)


def _stop(number: int, frame: types.FrameType | None) -> None:
    raise _OutOfTimeError
