"""Sampling and scoring on one device with transformers: token ids in, answers or log-probs out.

Used by the recipes through pool.py (one worker an actor) and by training for its dev measurement. Knows no files but
the model folder. Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coalign.config import GenerationTable, ModelTable
from coalign.encoding import Codec
from coalign.models import load_model, load_tokenizer, pick_device, pick_dtype

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw a token: greedy at temperature 0, else top-k, then top-p of the tempered distribution."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """Generated ids without the stop token; `finished` is False when the limit cut them off."""

    ids: list[int]
    finished: bool


def pick_tokens(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """Return a token id for each row by inverting the cumulative distribution at `uniform_B` in [0, 1).

    Logits are float32. A row's token depends on its own logits and number alone.
    """
    if sampling.temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    scores_BV, order_BV = (logits_BV.float() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        scores_BV, order_BV = scores_BV[:, : sampling.top_k], order_BV[:, : sampling.top_k]
    mass_BV = torch.softmax(scores_BV.double(), dim=-1).cumsum(dim=-1)
    if sampling.top_p < 1.0:
        # A token stays when the mass before it is below top_p, so at least one always stays.
        before_BV = torch.nn.functional.pad(mass_BV, (1, 0))[:, :-1]
        last_B = ((before_BV < sampling.top_p).sum(dim=-1) - 1).unsqueeze(1)
    else:
        last_B = torch.full((len(mass_BV), 1), mass_BV.shape[1] - 1, device=mass_BV.device)
    threshold_B = uniform_B.double().unsqueeze(1) * mass_BV.gather(1, last_B)
    index_B = torch.searchsorted(mass_BV, threshold_B, right=True).minimum(last_B)
    return order_BV.gather(1, index_B).squeeze(1)


def _left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and position_ids (B, T), rows aligned at the right."""
    width = max(len(row) for row in rows)
    ids_BT = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(dim=1) - 1).clamp(min=0),
    }


def _uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Return one counter-based stream of numbers in [0, 1) a seed: (B, count)."""
    streams = [np.random.Generator(np.random.Philox(key=seed)).random(count) for seed in seeds]
    return torch.from_numpy(np.stack(streams))


@torch.inference_mode()
def decode_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    codec: Codec,
) -> list[list[Answer]]:
    """Return, for each prompt, one answer a seed. The prompt is computed once; finished rows leave the batch."""
    device = model.device
    repeats = torch.tensor([len(s) for s in seeds], device=device)
    batch = _left_pad(prompts, codec.pad_id, device)
    output = model(**batch, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    source_B = torch.repeat_interleave(torch.arange(len(prompts), device=device), repeats)
    if int(repeats.max()) > 1 or len(set(repeats.tolist())) > 1:
        cache.batch_select_indices(source_B)
    logits_BV = output.logits[:, -1].float()[source_B]
    mask_BT = batch["attention_mask"][source_B]
    position_B = batch["position_ids"][source_B, -1]
    uniform_BT = _uniforms([s for group in seeds for s in group], sampling.max_new_tokens).to(device)
    stop = torch.tensor(codec.stop_ids, device=device)

    row_B = torch.arange(len(source_B), device=device)
    tokens: list[list[int]] = [[] for _ in range(len(source_B))]
    finished = [False] * len(source_B)
    for step in range(sampling.max_new_tokens):
        token_B = pick_tokens(logits_BV, uniform_BT[row_B, step], sampling)
        alive_B = ~torch.isin(token_B, stop)
        for row, token, alive in zip(row_B.tolist(), token_B.tolist(), alive_B.tolist(), strict=True):
            if alive:
                tokens[row].append(token)
            else:
                finished[row] = True
        if not alive_B.any() or step == sampling.max_new_tokens - 1:
            break
        if not alive_B.all():
            keep = alive_B.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            row_B, token_B, position_B, mask_BT = row_B[keep], token_B[keep], position_B[keep], mask_BT[keep]
        mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
        position_B = position_B + 1
        output = model(
            input_ids=token_B.unsqueeze(1),
            attention_mask=mask_BT,
            position_ids=position_B.unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
        )
        logits_BV = output.logits[:, -1].float()

    answers = iter([Answer(ids, done) for ids, done in zip(tokens, finished, strict=True)])
    return [[next(answers) for _ in group] for group in seeds]


@torch.no_grad()  # not inference_mode: a sharded model gathers its weights here and keeps them
def greedy_in_step(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    codec: Codec,
    any_rank: Callable[[bool], bool],
) -> list[Answer]:
    """Return greedy answers without a cache, every rank making the same number of forward passes.

    For the dev measurement inside training, where the model may be sharded over the ranks: `any_rank(flag)` tells
    whether the flag holds on any of them.
    """
    rows = [list(prompt) for prompt in prompts]
    finished = [False] * len(rows)
    for _ in range(max_new_tokens):
        batch = _left_pad(rows, codec.pad_id, next(model.parameters()).device)
        token_B = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(dim=-1).tolist()
        for index, token in enumerate(token_B):
            finished[index] = finished[index] or token in codec.stop_ids
            if not finished[index]:
                rows[index].append(token)
        if not any_rank(not all(finished)):
            break
    return [Answer(row[len(p) :], done) for row, p, done in zip(rows, prompts, finished, strict=True)]


@torch.inference_mode()
def score_batch(model: Any, requests: Sequence[Row], codec: Codec) -> list[list[float]]:
    """Return log P(continuation given prompt), summed over its tokens, for every continuation of every request.

    A continuation's last token is never an input, so continuations of one token share a single row.
    """
    index: dict[tuple[int, ...], int] = {}
    for request in requests:
        for continuation in request["continuations"]:
            index.setdefault((*request["prompt_ids"], *continuation[:-1]), len(index))
    batch = _left_pad(list(index), codec.pad_id, model.device)
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

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Return the rows with "answers": [{"text", "finish", "num_tokens"}], in their order."""
        sizes = [len(row["prompt_ids"]) + self.sampling.max_new_tokens for row in rows]
        widths = [len(row["seeds"]) for row in rows]
        results: list[Row] = [{} for _ in rows]
        for batch in _batches(sizes, widths, self.max_tokens, self.exact):
            prompts, seeds = [rows[i]["prompt_ids"] for i in batch], [rows[i]["seeds"] for i in batch]
            for i, answers in zip(
                batch, decode_batch(self.model, prompts, seeds, self.sampling, self.codec), strict=True
            ):
                results[i] = {k: v for k, v in rows[i].items() if k not in ("prompt_ids", "seeds")} | {
                    "answers": [
                        {
                            "text": self.codec.decode(answer.ids),
                            "finish": "stop" if answer.finished else "length",
                            "num_tokens": len(answer.ids) + answer.finished,
                        }
                        for answer in answers
                    ]
                }
        return results


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
