"""Which engine samples and scores: the one place that reads generation.engine.

Used by the recipes, which hand these functions to pool.py; they run where the shards are worked off.
"""

from __future__ import annotations

from typing import Protocol

from coalign.config import GenerationTable, ModelTable
from coalign.generation.sampling import Sampling
from coalign.records import Row

__all__ = ["Sampling", "make_generate_worker", "make_score_worker"]


class Worker(Protocol):
    """Works off one shard, as pool.py has it."""

    def __call__(self, rows: list[Row]) -> list[Row]: ...


def make_generate_worker(
    folder: str, model: ModelTable, generation: GenerationTable, sampling: Sampling, threads: int
) -> Worker:
    """Return a worker that answers requests {"prompt_ids", "seeds", ...}."""
    if generation.engine == "vllm":
        from coalign.generation import vllm_worker

        return vllm_worker.GenerateWorker(folder, model, generation, sampling, threads)
    from coalign.generation import transformers_worker as transformers_workers

    return transformers_workers.GenerateWorker(folder, model, generation, sampling, threads)


def make_score_worker(folder: str, model: ModelTable, generation: GenerationTable, threads: int) -> Worker:
    """Return a worker that scores requests {"prompt_ids", "continuations", ...}."""
    if generation.engine == "vllm":
        from coalign.generation import vllm_worker

        return vllm_worker.ScoreWorker(folder, model, generation, threads)
    from coalign.generation import transformers_worker as transformers_workers

    return transformers_workers.ScoreWorker(folder, model, generation, threads)
