"""How a token is drawn from logits: repetition penalty, temperature, top-k, top-p, one stream of numbers per seed.

Knows no model. Shape suffixes: B rows, V vocabulary, N seeds, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw a token: greedy at temperature 0, else from the tempered distribution cut by top-k, then top-p.

    `max_new_tokens` counts the stop token; `top_k` 0 and `top_p` 1 cut nothing. The repetition penalty changes logits
    before everything else (`penalised`).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


def pick_tokens(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """Return a token id for each row, (B,), by inverting the cumulative distribution at `uniform_B` in [0, 1).

    A row's token depends only on its own logits and number. The distribution is summed in float64 in the order of the
    vocabulary, with top-k or top-p from the most likely token down.
    """
    if sampling.temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    scores_BV, order_BV = logits_BV.float() / sampling.temperature, None
    if sampling.top_k or sampling.top_p < 1.0:
        scores_BV, order_BV = scores_BV.sort(dim=-1, descending=True, stable=True)
    if order_BV is not None and sampling.top_k:
        scores_BV, order_BV = scores_BV[:, : sampling.top_k], order_BV[:, : sampling.top_k]
    mass_BV = torch.softmax(scores_BV.double(), dim=-1).cumsum(dim=-1)
    if sampling.top_p < 1.0:
        # A token stays when the mass before it is below top_p, so at least one stays.
        before_BV = torch.nn.functional.pad(mass_BV, (1, 0))[:, :-1]
        last_B = ((before_BV < sampling.top_p).sum(dim=-1) - 1).unsqueeze(1)
    else:
        last_B = torch.full((len(mass_BV), 1), mass_BV.shape[1] - 1, device=mass_BV.device)
    threshold_B = uniform_B.double().unsqueeze(1) * mass_BV.gather(1, last_B)
    index_B = torch.searchsorted(mass_BV, threshold_B, right=True).minimum(last_B)
    return (index_B if order_BV is None else order_BV.gather(1, index_B)).squeeze(1)


def penalised(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Return logits, (B, V), with those of seen tokens divided by the penalty where positive, else multiplied by it.

    The penalty is that of CTRL (arXiv 1909.05858). As in transformers and vLLM, tokens of the prompt and of the answer
    so far are seen, and negative logits are multiplied.
    """
    lowered_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, lowered_BV, logits_BV)


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Return one counter-based (Philox) stream of numbers in [0, 1) per seed: (N, count), float64."""
    streams = [np.random.Generator(np.random.Philox(key=seed)).random(count) for seed in seeds]
    return torch.from_numpy(np.stack(streams))
