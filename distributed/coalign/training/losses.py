"""The losses, as pure functions of log-probs; slow twins are in tests/numerics.

Knows no model and no batch. Shape suffixes: N response tokens, R responses, P pairs of responses.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def sft_loss(logp_N: Tensor, num_tokens: int) -> Tensor:
    """Return - sum_t log P(y_t given a, x, y_<t) / num_tokens, where num_tokens counts the whole update."""
    return -logp_N.sum() / num_tokens


@dataclasses.dataclass(frozen=True)
class RankingLoss:
    """The loss of a micro-batch's groups, summed over them, and its parts, detached, for the log."""

    total: Tensor
    best: Tensor
    ranking: Tensor
    num_pairs: int
    num_active_pairs: Tensor


@dataclasses.dataclass(frozen=True)
class RankingForm:
    """The ranking term: its form, its weight lambda, the margin of hinge, the sharpness beta of logistic and dpo."""

    loss: Literal["hinge", "logistic", "dpo"] = "hinge"
    rank_weight: float = 1.0
    margin: float = 0.0
    beta: float = 1.0


def ranking_loss(
    logp_R: Tensor,
    length_R: Tensor,
    reward_R: Tensor,
    best_R: Tensor,
    group_R: Tensor,
    form: RankingForm,
    reference_R: Tensor | None = None,
) -> RankingLoss:
    """Return the sum over groups of -p(best) + lambda * (mean of phi over pairs with r_w > r_l).

    `logp_R` are summed log-probs; p(y) = logp / len is their mean per token, end-of-turn included. phi is by form:
    - "hinge": max(0, p(l) - p(w) + margin). With margin 0 and lambda 1 it is RRHF (arXiv 2304.05302, equations 2-4).
    - "logistic": softplus(beta (p(l) - p(w))).
    - "dpo": -log sigmoid(beta ((log P(w) - log P_ref(w)) - (log P(l) - log P_ref(l)))) (arXiv 2305.18290, equation 7).
      `reference_R` are the stage-1 model's summed log-probs under the same wording.

    A group without an ordered pair still gives -p(best). A pair is active while its gradient has not vanished: phi is
    above zero for hinge, else above 1 % of its value for two equal responses.

    `best_R` is true for the best response of each group. `reward_R`, `best_R` and `group_R` may lie on the CPU; then
    nothing waits for log-probs that a GPU still computes.
    """
    p_R = logp_R / length_R
    best = -p_R[best_R.nonzero().squeeze(1).to(p_R.device)].sum()
    pair_RR = (group_R.unsqueeze(1) == group_R.unsqueeze(0)) & (reward_R.unsqueeze(1) > reward_R.unsqueeze(0))
    winner_P, loser_P = pair_RR.nonzero(as_tuple=True)
    if len(winner_P) == 0:
        return RankingLoss(best, best.detach(), best.detach() * 0.0, 0, best.detach() * 0.0)
    pairs_P = torch.bincount(group_R[winner_P])[group_R[winner_P]]
    winner_P, loser_P, pairs_P = (values.to(p_R.device) for values in (winner_P, loser_P, pairs_P))
    if form.loss == "hinge":
        phi_P = F.relu(p_R[loser_P] - p_R[winner_P] + form.margin)
        active_P = phi_P > 0
    else:
        if form.loss == "dpo":
            assert reference_R is not None, "dpo needs the reference log-probs"
            score_R = logp_R - reference_R
        else:
            score_R = p_R
        phi_P = F.softplus(form.beta * (score_R[loser_P] - score_R[winner_P]))
        active_P = phi_P > 0.01 * math.log(2.0)
    ranking = (phi_P / pairs_P).sum()
    return RankingLoss(
        best + form.rank_weight * ranking,
        best.detach(),
        ranking.detach(),
        len(winner_P),
        active_P.sum(),
    )
