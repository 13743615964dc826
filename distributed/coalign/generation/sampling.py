"""How a token is drawn from logits: repetition penalty, temperature, top-k, top-p, one stream of numbers a seed.

Used by decoding and by the workers of either engine. Shape suffixes: B rows, V vocabulary, N seeds, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw a token: greedy at temperature 0, else top-k, then top-p of the tempered distribution.

    `repetition_penalty` changes logits before all of that (`penalised`).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


def pick_tokens(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """Return a token id for each row by inverting the cumulative distribution at `uniform_B` in [0, 1).

    Logits are float32. A row's token depends on its own logits and number alone. The distribution is summed up in the
    order of the vocabulary; with top-k or top-p, which need it, from the most likely token down.
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
        # A token stays when the mass before it is below top_p, so at least one always stays.
        before_BV = torch.nn.functional.pad(mass_BV, (1, 0))[:, :-1]
        last_B = ((before_BV < sampling.top_p).sum(dim=-1) - 1).unsqueeze(1)
    else:
        last_B = torch.full((len(mass_BV), 1), mass_BV.shape[1] - 1, device=mass_BV.device)
    threshold_B = uniform_B.double().unsqueeze(1) * mass_BV.gather(1, last_B)
    index_B = torch.searchsorted(mass_BV, threshold_B, right=True).minimum(last_B)
    return (index_B if order_BV is None else order_BV.gather(1, index_B)).squeeze(1)


def penalised(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Return logits of tokens that were seen divided by the penalty where positive, else multiplied (arXiv 1909.05858).

    As transformers and vLLM do: seen is what stands in the prompt or in the answer so far.
    """
    lowered_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, lowered_BV, logits_BV)


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Return one counter-based stream of numbers in [0, 1) a seed: (N, count)."""
    streams = [np.random.Generator(np.random.Philox(key=seed)).random(count) for seed in seeds]
    return torch.from_numpy(np.stack(streams))
