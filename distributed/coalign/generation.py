"""Workers that sample and score on one device with transformers: token ids in, answers or log-probs out.

Used by the recipes through pool.py (one worker an actor). Knows no files but the model folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from coalign.config import GenerationTable, ModelTable
from coalign.decoding import Answer, Sampling, decode, left_pad
from coalign.encoding import Codec
from coalign.errors import UserError
from coalign.models import load_model, load_tokenizer, pick_device, pick_dtype
from coalign.slots import has_plain_cache

__all__ = ["GenerateWorker", "Sampling", "ScoreWorker"]

Row = dict[str, Any]


@torch.inference_mode()
def score_batch(model: Any, requests: Sequence[Row], codec: Codec) -> list[list[float]]:
    """Return log P(continuation given prompt), summed over its tokens, for every continuation of every request.

    A continuation's last token is never an input, so continuations of one token share a single row.
    """
    index: dict[tuple[int, ...], int] = {}
    for request in requests:
        for continuation in request["continuations"]:
            index.setdefault((*request["prompt_ids"], *continuation[:-1]), len(index))
    batch = left_pad(list(index), codec.pad_id, model.device)
    longest = max(len(c) for request in requests for c in request["continuations"])
    logits_BTV = model(**batch, use_cache=False, logits_to_keep=longest).logits
    logp_BTV = torch.log_softmax(logits_BTV.float(), dim=-1).cpu()
    results = []
    for request in requests:
        scores = []
        for continuation in request["continuations"]:
            row = logp_BTV[index[(*request["prompt_ids"], *continuation[:-1])]]
            picked = row[len(row) - len(continuation) :].gather(1, torch.tensor(continuation).unsqueeze(1))
            scores.append(float(picked.double().sum()))
        results.append(scores)
    return results


def _batches(sizes: Sequence[int], widths: Sequence[int], max_tokens: int, exact: bool) -> Iterator[list[int]]:
    """Yield indices of requests computed together: longest first under the token budget, or one by one if exact."""
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    batch: list[int] = []
    width = rows = 0
    for i in order:
        grown_width, grown_rows = max(width, sizes[i]), rows + widths[i]
        if batch and (exact or grown_width * grown_rows > max_tokens):
            yield batch
            batch, grown_width, grown_rows = [], sizes[i], widths[i]
        batch.append(i)
        width, rows = grown_width, grown_rows
    if batch:
        yield batch


class _Worker:
    """Holds one model on one device; each call works off one shard."""

    def __init__(self, folder: str, model: ModelTable, generation: GenerationTable, threads: int) -> None:
        if threads:
            torch.set_num_threads(threads)
        device = pick_device()
        self.codec = Codec(load_tokenizer(folder, model), model)
        self.model = load_model(folder, model, pick_dtype(generation.dtype, device)).to(device).eval()
        self.max_tokens = generation.batch_tokens
        self.exact = generation.mode == "exact"


class GenerateWorker(_Worker):
    """Answers requests {"prompt_ids", "seeds", ...}: one answer a seed, other keys passed through."""

    def __init__(
        self, folder: str, model: ModelTable, generation: GenerationTable, sampling: Sampling, threads: int
    ) -> None:
        super().__init__(folder, model, generation, threads)
        self.sampling = sampling
        if not has_plain_cache(self.model):
            raise UserError(
                f"{folder}: a {self.model.config.model_type} model keeps more than keys and values of its tokens, which"
                " sampling can't move between rows; use a model with attention in every layer"
            )

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Return the rows with "answers": [{"text", "finish", "num_tokens"}], in their order."""
        parts = [[row] for row in rows] if self.exact else [rows]
        return [answered for part in parts for answered in self._answer(part)]

    def _answer(self, rows: list[Row]) -> list[Row]:
        prompts, seeds = [row["prompt_ids"] for row in rows], [row["seeds"] for row in rows]
        found = decode(self.model, prompts, seeds, self.sampling, self.codec, self.max_tokens)
        return [
            {k: v for k, v in row.items() if k not in ("prompt_ids", "seeds")}
            | {"answers": [self._describe(answer) for answer in answers]}
            for row, answers in zip(rows, found, strict=True)
        ]

    def _describe(self, answer: Answer) -> Row:
        return {
            "text": self.codec.decode(answer.ids),
            "finish": "stop" if answer.finished else "length",
            "num_tokens": len(answer.ids) + answer.finished,
        }


class ScoreWorker(_Worker):
    """Scores requests {"prompt_ids", "continuations", ...}: log-probs, other keys passed through."""

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Return the rows with "logps": one float a continuation, in nats."""
        sizes = [len(row["prompt_ids"]) + max(len(c) for c in row["continuations"]) for row in rows]
        widths = [len({tuple(c[:-1]) for c in row["continuations"]}) for row in rows]
        results: list[Row] = [{} for _ in rows]
        for batch in _batches(sizes, widths, self.max_tokens, self.exact):
            for i, logps in zip(batch, score_batch(self.model, [rows[i] for i in batch], self.codec), strict=True):
                results[i] = {k: v for k, v in rows[i].items() if k not in ("prompt_ids", "continuations")} | {
                    "logps": logps
                }
        return results
