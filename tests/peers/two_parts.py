"""What vLLM says with a model in one process and over two, as JSON. Run by test_vllm_engine, in vLLM's environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from coalign.config import GenerationTable, ModelTable
from coalign.generation import vllm_worker
from coalign.generation.sampling import Sampling

MODEL = ModelTable(max_tokens=64)
engine_options = vllm_worker.engine_options


def laid_over_cores(folder: str, model: ModelTable, generation: GenerationTable, max_tokens: int) -> dict[str, Any]:
    """Return the options of a CPU with those of several GPUs, which a CPU's own processes stand for here."""
    return engine_options(folder, model, generation, max_tokens) | vllm_worker.parallel_options(generation)


def answered(folder: str, num_parts: int) -> dict[str, Any]:
    """Return greedy answers and log-probs, and over how many processes the model lay."""
    prompts = [[7, 30, 41, 9], [12, 12, 5], [60, 31, 8, 19, 77, 42, 20]]
    table = GenerationTable(
        engine="vllm", mode="fast", dtype="float32", batch_tokens=2048, gpus_per_worker=float(num_parts)
    )
    asked = [{"prompt_ids": ids, "seeds": [0]} for ids in prompts]
    scored = [{"prompt_ids": ids, "continuations": [[5], [6, 7, 8]]} for ids in prompts]
    worker = vllm_worker.GenerateWorker(folder, MODEL, table, Sampling(max_new_tokens=12), 0)
    return {
        "parts": worker.engine.llm_engine.vllm_config.parallel_config.world_size,
        "answers": worker(asked),
        "logps": [row["logps"] for row in vllm_worker.ScoreWorker(folder, MODEL, table, 0)(scored)],
    }


def main(folder: str, found: str) -> None:
    with mock.patch("coalign.generation.vllm_worker.engine_options", laid_over_cores):
        content = {parts: answered(folder, parts) for parts in (1, 2)}
    Path(found).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":  # vLLM's processes import this module too
    main(*sys.argv[1:])
