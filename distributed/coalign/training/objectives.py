"""What an update of either stage minimises, as shares of micro-batches that add up, and the numbers logged of it.

Knows no engine and no schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coalign.models.logprobs import Batch, sum_by_response
from coalign.training.losses import RankingForm, ranking_loss, sft_loss
from coalign.training.micro_batches import Item

Sums = dict[str, float | Tensor]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What one update minimises: the denominator of its items, and the loss of one micro-batch with summed parts.

    `loss(logp_N, batch, items, denominator)` returns this micro-batch's share of the update's loss and a dict of sums.
    These are added over micro-batches and ranks; they may be tensors that a GPU still computes. `describe(sums)` turns
    the totals into the numbers logged. `shared_prefix` says how a group is laid out.
    """

    denominator: Callable[[Sequence[Item]], int]
    loss: Callable[[Tensor, Batch, Sequence[Item], int], tuple[Tensor, Sums]]
    describe: Callable[[dict[str, float]], dict[str, float]]
    shared_prefix: bool = False


def sft_objective() -> Objective:
    """Return the objective of stage 1: negative log-likelihood per answer token of the update."""

    def loss(logp_N: Tensor, batch: Batch, items: Sequence[Item], tokens: int) -> tuple[Tensor, Sums]:
        return sft_loss(logp_N, tokens), {"answer_tokens": float(len(logp_N))}

    def describe(sums: dict[str, float]) -> dict[str, float]:
        return {"answer_tokens": sums["answer_tokens"]}

    return Objective(lambda items: sum(item.num_response_tokens for item in items), loss, describe)


def align_objective(form: RankingForm, shared_prefix: bool) -> Objective:
    """Return the objective of stage 2: losses.ranking_loss per group of the update."""

    def loss(logp_N: Tensor, batch: Batch, items: Sequence[Item], groups: int) -> tuple[Tensor, Sums]:
        logp_R = sum_by_response(logp_N, batch)
        group = [g for g, item in enumerate(items) for _ in item.responses]
        best_R = torch.tensor([k == item.best for item in items for k in range(len(item.responses))])
        reference = [x for item in items for x in item.reference]
        length_R = torch.tensor([len(response) for item in items for response in item.responses])
        length = length_R.to(logp_R.device)
        parts = ranking_loss(
            logp_R,
            length,
            torch.tensor([r for item in items for r in item.rewards]),
            best_R,
            torch.tensor(group),
            form,
            torch.tensor(reference, dtype=logp_R.dtype, device=logp_R.device) if reference else None,
        )
        p_R, others_R = (logp_R / length).detach(), ~best_R
        worst_R = others_R & torch.tensor([r == min(item.rewards) for item in items for r in item.rewards])
        return parts.total / groups, {
            "groups": float(len(items)),
            "best": parts.best,
            "ranking": parts.ranking,
            "pairs": float(parts.num_pairs),
            "active": parts.num_active_pairs,
            "p_others": (p_R * others_R.to(p_R.device)).sum(),
            "others": float(others_R.sum()),
            "p_worst": (p_R * worst_R.to(p_R.device)).sum(),
            "worst": float(worst_R.sum()),
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
