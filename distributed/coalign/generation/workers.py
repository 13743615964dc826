"""Which engine samples and scores: the one place that reads generation.engine.

Recipes hand these functions to clusters/, which calls them in each worker's process. Knows neither transformers nor
vLLM until a worker is made.
"""

from __future__ import annotations

from coalign.config import GenerationTable, ModelTable
from coalign.generation.sampling import Sampling
from coalign.records import Worker

__all__ = ["Sampling", "make_generate_worker", "make_score_worker"]


def make_generate_worker(
    folder: str, model: ModelTable, generation: GenerationTable, sampling: Sampling, threads: int
) -> Worker:
    """Return a worker that answers requests {"prompt_ids", "seeds", ...} with the model in `folder`.

    `threads` are those of torch (0: its default). Raises UserError when the engine or the model can't be loaded.
    """
    if generation.engine == "vllm":
        from coalign.generation import vllm_worker

        return vllm_worker.GenerateWorker(folder, model, generation, sampling, threads)
    from coalign.generation import transformers_worker

    return transformers_worker.GenerateWorker(folder, model, generation, sampling, threads)


def make_score_worker(folder: str, model: ModelTable, generation: GenerationTable, threads: int) -> Worker:
    """Return a worker that scores requests {"prompt_ids", "continuations", ...} with the model in `folder`.

    `threads` and errors are those of `make_generate_worker`.
    """
    if generation.engine == "vllm":
        from coalign.generation import vllm_worker

        return vllm_worker.ScoreWorker(folder, model, generation, threads)
    from coalign.generation import transformers_worker

    return transformers_worker.ScoreWorker(folder, model, generation, threads)
