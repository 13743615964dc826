"""What an update of either stage minimises, as shares of micro-batches that add up, and what is logged of it.

Used by launch/sft.py, launch/align.py and training.py. Knows no engine and no schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coalign.batching import Item
from coalign.logprobs import Batch, sum_by_response
from coalign.losses import RankingForm, ranking_loss, sft_loss


@dataclasses.dataclass(frozen=True)
class Objective:
    """What one update minimises: the denominator of its items, and the loss of one micro-batch with summed parts.

    `shared_prefix` says how a group is laid out.
    `loss(logp_N, batch, items, denominator)` returns this micro-batch's share of the update's loss and a dict of sums
    that are added over micro-batches and ranks; `describe(sums)` turns them into what is logged.
    """

    denominator: Callable[[Sequence[Item]], int]
    loss: Callable[[Tensor, Batch, Sequence[Item], int], tuple[Tensor, dict[str, float]]]
    describe: Callable[[dict[str, float]], dict[str, float]]
    shared_prefix: bool = False


def sft_objective() -> Objective:
    """Return stage 1: negative log-likelihood a token, over all answer tokens of the update."""

    def loss(logp_N: Tensor, batch: Batch, items: Sequence[Item], tokens: int) -> tuple[Tensor, dict[str, float]]:
        return sft_loss(logp_N, tokens), {"answer_tokens": float(len(logp_N))}

    def describe(sums: dict[str, float]) -> dict[str, float]:
        return {"answer_tokens": sums["answer_tokens"]}

    return Objective(lambda items: sum(item.num_response_tokens for item in items), loss, describe)


def align_objective(form: RankingForm, shared_prefix: bool) -> Objective:
    """Return stage 2: the ranking loss of losses.ranking_loss, divided by the update's number of groups."""

    def loss(logp_N: Tensor, batch: Batch, items: Sequence[Item], groups: int) -> tuple[Tensor, dict[str, float]]:
        device = logp_N.device
        logp_R = sum_by_response(logp_N, batch)
        group = [g for g, item in enumerate(items) for _ in item.responses]
        best = [k == item.best for item in items for k in range(len(item.responses))]
        reference = [x for item in items for x in item.reference]
        length_R = torch.bincount(batch.response_N, minlength=batch.num_responses)
        parts = ranking_loss(
            logp_R,
            length_R,
            torch.tensor([r for item in items for r in item.rewards], device=device),
            torch.tensor(best, device=device),
            torch.tensor(group, device=device),
            form,
            torch.tensor(reference, dtype=logp_R.dtype, device=device) if reference else None,
        )
        p_R, best_R = (logp_R / length_R).detach(), torch.tensor(best, device=device)
        others = p_R[~best_R]
        lowest = [r == min(item.rewards) for item in items for r in item.rewards]
        worst = p_R[~best_R & torch.tensor(lowest, device=device)]
        return parts.total / groups, {
            "groups": float(len(items)),
            "best": float(parts.best),
            "ranking": float(parts.ranking),
            "pairs": float(parts.num_pairs),
            "active": float(parts.num_active_pairs),
            "p_others": float(others.sum()),
            "others": float(len(others)),
            "p_worst": float(worst.sum()),
            "worst": float(len(worst)),
            "best_tokens": float(length_R[best_R].sum()),
        }

    def describe(sums: dict[str, float]) -> dict[str, float]:
        groups = sums["groups"]
        return {
            "loss_best": sums["best"] / groups,
            "loss_ranking": sums["ranking"] / groups,
            "active_pairs": sums["active"] / max(sums["pairs"], 1.0),
            "pairs": sums["pairs"],
            "p_best": -sums["best"] / groups,
            "p_others": sums["p_others"] / max(sums["others"], 1.0),
            "p_worst": sums["p_worst"] / max(sums["worst"], 1.0),
            "best_length": sums["best_tokens"] / groups,
        }

    return Objective(len, loss, describe, shared_prefix)
