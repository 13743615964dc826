"""losses: against slow double loops in float64, gradcheck, hand-computed values and RRHF's own formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from coalign.training.losses import RankingForm, ranking_loss, sft_loss

FORMS = [
    RankingForm("hinge"),
    RankingForm("hinge", rank_weight=0.3, margin=0.7),
    RankingForm("logistic", rank_weight=2.0, beta=1.5),
    RankingForm("dpo", rank_weight=0.5, beta=0.1),
]


def slow_ranking_loss(groups: list[list[dict[str, Any]]], form: RankingForm) -> dict[str, float]:
    """Follow the definition response by response."""
    best = ranking = 0.0
    pairs = active = 0
    for group in groups:
        best -= sum(y["logp"] / y["length"] for y in group if y["best"])
        phis = []
        for w in group:
            for l in group:  # noqa: E741
                if w["reward"] <= l["reward"]:
                    continue
                p_w, p_l = w["logp"] / w["length"], l["logp"] / l["length"]
                if form.loss == "hinge":
                    phi = max(0.0, p_l - p_w + form.margin)
                    active += phi > 0
                elif form.loss == "logistic":
                    phi = math.log(1 + math.exp(form.beta * (p_l - p_w)))
                    active += phi > 0.01 * math.log(2)
                else:
                    gain_w, gain_l = w["logp"] - w["reference"], l["logp"] - l["reference"]
                    phi = -math.log(1 / (1 + math.exp(-form.beta * (gain_w - gain_l))))
                    active += phi > 0.01 * math.log(2)
                phis.append(phi)
        pairs += len(phis)
        if phis:
            ranking += sum(phis) / len(phis)
    return {
        "total": best + form.rank_weight * ranking,
        "ranking": ranking,
        "pairs": pairs,
        "active": active,
        "best": best,
    }


def random_groups(seed: int) -> list[list[dict[str, Any]]]:
    """Return groups with ties, without any ordered pair, and of one candidate."""
    draw = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    groups = []
    for number in range(6):
        size = 1 if number == 0 else integer(2, 6)
        rewards = [1] * size if number == 1 else [integer(0, 2) for _ in range(size)]
        chosen = rewards.index(max(rewards))
        group = []
        for k, reward in enumerate(rewards):
            length = integer(1, 9)
            logp = -length * 3 * float(torch.rand(1, generator=draw, dtype=torch.float64))
            reference = logp + 8 * (float(torch.rand(1, generator=draw, dtype=torch.float64)) - 0.5)
            group.append(
                {"logp": logp, "length": length, "reward": reward, "best": k == chosen, "reference": reference}
            )
        groups.append(group)
    return groups


def as_tensors(groups: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
    flat = [(y, g) for g, group in enumerate(groups) for y in group]
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(1)).tolist()
    flat = [flat[i] for i in order]  # the order of responses must not matter
    return {
        "logp_R": torch.tensor([y["logp"] for y, _ in flat], dtype=torch.float64),
        "length_R": torch.tensor([y["length"] for y, _ in flat]),
        "reward_R": torch.tensor([y["reward"] for y, _ in flat]),
        "best_R": torch.tensor([y["best"] for y, _ in flat]),
        "group_R": torch.tensor([g for _, g in flat]),
        "reference_R": torch.tensor([y["reference"] for y, _ in flat], dtype=torch.float64),
    }


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.loss}-{f.rank_weight}")
@pytest.mark.parametrize("seed", range(5))
def test_ranking_loss_equals_the_double_loop(form: RankingForm, seed: int) -> None:
    """Every part equals its definition, over ties, groups without an ordered pair and single candidates."""
    groups = random_groups(seed)
    found = ranking_loss(**as_tensors(groups), form=form)
    expected = slow_ranking_loss(groups, form)
    assert float(found.total) == pytest.approx(expected["total"], rel=1e-12)
    assert float(found.best) == pytest.approx(expected["best"], rel=1e-12)
    assert float(found.ranking) == pytest.approx(expected["ranking"], rel=1e-12)
    assert (found.num_pairs, found.num_active_pairs) == (expected["pairs"], expected["active"])
    assert expected["ranking"] > 0


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.loss}-{f.rank_weight}")
def test_ranking_loss_has_the_right_gradient(form: RankingForm) -> None:
    """The analytic gradient agrees with finite differences."""
    tensors = as_tensors(random_groups(7))
    logp_R = tensors.pop("logp_R").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ranking_loss(logp_R=x, form=form, **tensors).total, logp_R)


def test_ranking_loss_by_hand() -> None:
    """Two groups worked out on paper: one with pairs, one whose only candidate still counts."""
    # group 0: p = -1 (reward 2, best), -0.5 (reward 1), -3 (reward 0); pairs 2>1: 0.5, 2>0: 0, 1>0: 0 -> mean 1/6
    # group 1: p = -0.25, alone
    found = ranking_loss(
        torch.tensor([-2.0, -2.0, -3.0, -1.0]),
        torch.tensor([2, 4, 1, 4]),
        torch.tensor([2, 1, 0, 2]),
        torch.tensor([True, False, False, True]),
        torch.tensor([0, 0, 0, 1]),
        RankingForm("hinge"),
    )
    assert float(found.best) == pytest.approx(1.25)
    assert float(found.ranking) == pytest.approx(0.5 / 3)
    assert float(found.total) == pytest.approx(1.25 + 0.5 / 3)
    assert (found.num_pairs, found.num_active_pairs) == (3, 1)


def test_a_group_without_an_ordered_pair_still_raises_its_best_answer() -> None:
    """Equal rewards give -p(best), with its gradient, and no ranking term."""
    logp_R = torch.tensor([-4.0, -2.0], requires_grad=True)
    found = ranking_loss(
        logp_R, torch.tensor([2, 2]), torch.tensor([1, 1]), torch.tensor([True, False]), torch.tensor([0, 0]),
        RankingForm("logistic"),
    )  # fmt: skip
    found.total.backward()
    assert (float(found.total.detach()), float(found.ranking), found.num_pairs) == (2.0, 0.0, 0)
    assert logp_R.grad is not None and logp_R.grad.tolist() == [-0.5, 0.0]


def test_hinge_without_margin_is_rrhf_up_to_the_stated_means() -> None:
    """RRHF sums over pairs and over the best response's tokens (equations 2-4); ours are means over both."""
    for seed in range(5):
        group = next(g for g in random_groups(seed) if len({y["reward"] for y in g}) > 1)
        p = [y["logp"] / y["length"] for y in group]
        pairs = [(i, j) for i, a in enumerate(group) for j, b in enumerate(group) if a["reward"] < b["reward"]]
        rank_sum = sum(max(0.0, p[i] - p[j]) for i, j in pairs)  # equation 3
        chosen = next(y for y in group if y["best"])
        fine_tuning_sum = -chosen["logp"]  # equation 4
        found = ranking_loss(**as_tensors([group]), form=RankingForm("hinge"))
        assert float(found.total) == pytest.approx(fine_tuning_sum / chosen["length"] + rank_sum / len(pairs))


def test_sft_loss_is_a_mean_over_the_whole_update() -> None:
    """Micro-batches add up to the mean over all tokens, whatever their sizes, and the gradient is -1/N."""
    logp_N = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = -sum(logp_N.tolist()) / 11
    assert float(sft_loss(logp_N, 11).detach()) == pytest.approx(expected, rel=1e-12)
    parts = sft_loss(logp_N[:4], 11) + sft_loss(logp_N[4:], 11)
    assert float(parts.detach()) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, 11), logp_N)
