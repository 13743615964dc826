"""Workers that sample and score with transformers, on one device or with a model's layers on several GPUs.

Token ids in, answers or log-probs out. Knows no files but the model folder, and not where its process runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from coalign.config import GenerationTable, ModelTable
from coalign.generation.cuda_graphs import FixedSteps
from coalign.generation.decoding import decode
from coalign.generation.sampling import Sampling
from coalign.generation.scoring import score
from coalign.models.model_checks import check_model
from coalign.models.model_folder import load_codec, load_model, pick_device, pick_dtype
from coalign.models.shape import shape_of
from coalign.models.worker_memory import TOKENS_ON_CPU, tokens_in_flight
from coalign.records import Row

__all__ = ["GenerateWorker", "Sampling", "ScoreWorker"]


class _Worker:
    """Holds one model; each call processes one shard."""

    samples = False

    def __init__(self, folder: str, model: ModelTable, generation: GenerationTable, threads: int) -> None:
        if threads:
            torch.set_num_threads(threads)
        device = pick_device()
        self.codec = load_codec(folder, model)
        dtype, gpus = pick_dtype(generation.dtype, device), int(generation.gpus_per_worker)
        if device.type == "cuda" and gpus > 1:
            self.model = load_model(folder, model, dtype, gpus).eval()
        else:
            self.model = load_model(folder, model, dtype).to(device).eval()
        check_model(self.model, self.codec.pad_id, folder, self.samples)
        self.max_tokens = generation.batch_tokens or _tokens_in_flight(self.model, generation)
        self.exact = generation.mode == "exact"


def _tokens_in_flight(model: Any, generation: GenerationTable) -> int:
    """Return the tokens in flight for batch_tokens = 0, by the device and its free memory."""
    if model.device.type == "cpu":
        return TOKENS_ON_CPU
    free, _ = torch.cuda.mem_get_info(model.device)
    part = generation.gpus_per_worker if 0 < generation.gpus_per_worker < 1 else 1.0  # other workers share the GPU
    return tokens_in_flight(shape_of(model.config.get_text_config()), generation.dtype, part * free)


class GenerateWorker(_Worker):
    """Answers requests {"prompt_ids", "seeds", ...}: one answer per seed, other keys passed through.

    `threads` are those of torch (0: its default). Raises UserError for a model whose cache holds more than keys and
    values.
    """

    samples = True

    def __init__(
        self, folder: str, model: ModelTable, generation: GenerationTable, sampling: Sampling, threads: int
    ) -> None:
        super().__init__(folder, model, generation, threads)
        self.sampling = dataclasses.replace(sampling, repetition_penalty=generation.repetition_penalty)
        # In exact mode results may not depend on earlier requests, and recording does: it starts after a few steps.
        self.fixed = FixedSteps(self.model) if self.model.device.type == "cuda" and not self.exact else None

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Return the rows with "answers": [{"text", "finish", "num_tokens"}], in their order."""
        parts = [[row] for row in rows] if self.exact else [rows]
        return [answered for part in parts for answered in self._answer(part)]

    def _answer(self, rows: list[Row]) -> list[Row]:
        prompts, seeds = [row["prompt_ids"] for row in rows], [row["seeds"] for row in rows]
        found = decode(self.model, prompts, seeds, self.sampling, self.codec, self.max_tokens, self.fixed)
        return [
            {k: v for k, v in row.items() if k not in ("prompt_ids", "seeds")}
            | {"answers": [self.codec.describe_answer(answer.ids, answer.finished) for answer in answers]}
            for row, answers in zip(rows, found, strict=True)
        ]


class ScoreWorker(_Worker):
    """Scores requests {"prompt_ids", "continuations", ...}: log-probs, other keys passed through."""

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Return the rows with "logps": one float per continuation, in nats."""
        parts = [[row] for row in rows] if self.exact else [rows]
        return [scored for part in parts for scored in self._score(part)]

    def _score(self, rows: list[Row]) -> list[Row]:
        # Sharing a beginning makes the rounding of requests depend on each other, which exact mode forbids.
        found = score(self.model, rows, self.codec, self.max_tokens, share=not self.exact)
        return [
            {k: v for k, v in row.items() if k not in ("prompt_ids", "continuations")} | {"logps": logps}
            for row, logps in zip(rows, found, strict=True)
        ]
