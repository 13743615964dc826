"""A step's requests in shards: those on disk are read, the missing ones computed by workers and written.

Knows neither models nor what a row means.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from coalign.clusters.worker_pool import map_shards, require_shared
from coalign.config import GenerationTable
from coalign.errors import UserError
from coalign.recipe import progress_bar
from coalign.records import Row, Worker, is_result, read_rows
from coalign.runs.atomic_files import write_rows
from coalign.runs.step_folder import StepFolder

logger = logging.getLogger("coalign")


def run_shards(
    step: StepFolder,
    requests: Sequence[Row],
    make_worker: Callable[[], Worker],
    settings: GenerationTable,
    title: str,
    name: str = "",
) -> Iterator[Row]:
    """Yield every request's result row in order, computing only the shards that are not on disk yet.

    A shard has generation.shard_size rows. One on disk counts only with a complete result for each of its requests.
    Shards lie in the step's folder shards/, their file names begin with `name`. The driver alone writes them, each
    atomically. Raises what `map_shards` raises.
    """
    size = settings.shard_size
    folder = step.path / "shards"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}{'-' if name else ''}{i:05d}.jsonl" for i in range(math.ceil(len(requests) / size))]
    asked = [requests[i * size : (i + 1) * size] for i in range(len(paths))]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    damaged = [i for i, path in enumerate(paths) if path.exists() and not _is_whole(path, asked[i])]
    if damaged:
        logger.info(
            "%s: damaged shards are computed again: %d, the first is %s", title, len(damaged), paths[damaged[0]]
        )
        missing = sorted([*missing, *damaged])
    if len(missing) < len(paths):
        logger.info("%s: %d of %d shards are done already", title, len(paths) - len(missing), len(paths))
    shards = [(i, list(asked[i])) for i in missing]
    if shards and settings.workers:
        require_shared(settings, step.path)
    done = len(requests) - sum(len(rows) for _, rows in shards)
    with progress_bar(title, "prompt", len(requests), done, bool(shards)) as bar:
        for index, results in map_shards(make_worker, shards, settings, title):
            assert len(results) == len(asked[index])
            write_rows(paths[index], results)
            bar.update(len(results))
    for path in paths:
        for _, row in read_rows(path):
            yield row


def _is_whole(path: Path, requests: Sequence[Row]) -> bool:
    """Return whether a shard on disk holds the results of exactly these requests."""
    try:
        rows = [row for _, row in read_rows(path)]
    except UserError:
        return False
    return len(rows) == len(requests) and all(map(is_result, rows, requests))
