"""A map over chunks in forked processes, one per core, which share the memory that the function refers to.

Knows no tokens.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from coalign.recipe import exit_with_parent, progress_bar

Job = TypeVar("Job")
Result = TypeVar("Result")

CHUNK = 1024  # rows that a process encodes at a time
SHOWN_CHUNKS = 20  # fewer take too little time for a progress bar

_work: Callable[[Any], Any] | None = None  # the function that forked processes call


def forked_map(
    work: Callable[[Sequence[Job]], Result], chunks: Sequence[Sequence[Job]], title: str
) -> Iterator[Result]:
    """Yield `work(chunk)` for every chunk, in order, from one process per core that this process may use.

    Processes are forked and share the data that `work` refers to, so a chunk can be as little as a range of numbers. A
    single chunk, or a single core, is handled in this process. A progress bar with a title shows many chunks.
    """
    with progress_bar(title, "row", sum(map(len, chunks)), shown=len(chunks) >= SHOWN_CHUNKS) as bar:
        for chunk, result in zip(chunks, _results(work, chunks), strict=True):
            bar.update(len(chunk))
            yield result


def _results(work: Callable[[Sequence[Job]], Result], chunks: Sequence[Sequence[Job]]) -> Iterator[Result]:
    global _work
    count = min(len(os.sched_getaffinity(0)), len(chunks))
    if count < 2:
        yield from map(work, chunks)
        return
    _work = work
    asked = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork, and all cores are in use
    try:
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(count, context, initializer=_begin) as pool:
            yield from pool.map(_run, chunks)
    finally:
        _work = None
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if asked is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = asked


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends this process
    exit_with_parent()


def _run(chunk: Any) -> Any:
    assert _work is not None
    return _work(chunk)


def chunks_of(jobs: Sequence[Job]) -> list[Sequence[Job]]:
    """Return jobs in chunks of CHUNK for `forked_map`."""
    return [jobs[start : start + CHUNK] for start in range(0, len(jobs), CHUNK)]
