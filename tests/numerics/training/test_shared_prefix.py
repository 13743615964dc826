"""Shared-prefix groups: the same log-probs, loss and gradients as one row per response, or refused."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch

from coalign.config import LoraTable, TrainTable
from coalign.models.attention import layer_windows
from coalign.models.logprobs import token_logps
from coalign.models.lora import attach_lora
from coalign.models.model_folder import switch_off_dropout
from coalign.training.layout_checks import complaint_of_sharing, settle_layout
from coalign.training.losses import RankingForm
from coalign.training.micro_batches import Item, collate, micro_batches
from coalign.training.objectives import align_objective
from numerics.engine import TorchEngine
from numerics.tiny import FAMILIES, network, random_items

FORM = RankingForm("hinge", rank_weight=1.0, margin=0.5)


def computed(
    model: Any, items: list[Item], shared: bool, form: RankingForm = FORM, per_row: list[int] | None = None
) -> tuple[Any, float, list[Any]]:
    """Return log-probs, loss and gradients of all items in one batch."""
    objective = align_objective(form, shared)
    batch = collate(items, 0, shared, per_row)
    model.zero_grad()
    logp_N = token_logps(model, batch)
    loss, _ = objective.loss(logp_N, batch, items, objective.denominator(items))
    loss.backward()
    return logp_N.detach(), float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def with_lora(model: Any) -> Any:
    """Return a network with adapters that change its answers."""
    dtype = model.dtype
    adapted = attach_lora(model, LoraTable(enabled=True, rank=2, alpha=4.0)).to(dtype)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def with_checkpointing(model: Any) -> Any:
    """Return a network in training that recomputes its activations in the backward pass."""
    switch_off_dropout(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def assert_equal(found: tuple[Any, float, list[Any]], expected: tuple[Any, float, list[Any]], tolerance: float) -> None:
    """Compare log-probs, loss and gradients, which in float32 may differ by a share of their size."""
    assert torch.allclose(found[0], expected[0], rtol=0, atol=tolerance)
    assert found[1] == pytest.approx(expected[1], abs=tolerance)
    assert len(found[2]) == len(expected[2]) > 3 and sum(float(g.abs().sum()) for g in expected[2]) > 1
    for a, b in zip(found[2], expected[2], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=tolerance * (1 + float(b.abs().max()) * (tolerance > 1e-9)))


@pytest.mark.parametrize("prepare", [None, with_lora, with_checkpointing], ids=["plain", "lora", "checkpointing"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_equal_plain_rows(family: str, dtype: torch.dtype, tolerance: float, prepare: Any) -> None:
    """Log-probs, loss and every gradient agree: unlike lengths, one-token responses, several groups."""
    items = random_items(5, seed=3)
    assert {1} < {len(r) for item in items for r in item.responses} and len({len(i.prompt) for i in items}) > 2
    model = network(family, dtype)
    model = prepare(model) if prepare else model
    plain = computed(model, items, False)
    assert_equal(computed(model, items, True), plain, tolerance)
    for per_row in ([5], [2, 1, 2]):  # several groups per row, the last one the shortest
        assert_equal(computed(model, items, True, per_row=per_row), plain, tolerance)


WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0},
}


@pytest.mark.parametrize("family", WINDOWS)
def test_groups_longer_than_a_sliding_window_equal_plain_rows(family: str) -> None:
    """A window counts positions, which restart after the prompt, and not places in the row."""
    model, items = network(family, **WINDOWS[family]), random_items(5, seed=3)
    assert max(item.longest() for item in items) > 8 and list(layer_windows(model.config).values()) == [4]
    plain = computed(model, items, False)
    assert_equal(computed(model, items, True), plain, 1e-9)
    assert_equal(computed(model, items, True, per_row=[3, 2]), plain, 1e-9)
    assert not torch.allclose(computed(model, items, False)[0], computed(network(family), items, False)[0], atol=1e-3)
    assert not complaint_of_sharing(engine_of(model), items, 0, True)


def test_gemma2_groups_equal_plain_rows_with_soft_caps() -> None:
    """Capped attention and capped logits: the eager kernel, in float32."""
    model = network("gemma2", torch.float32, attn_logit_softcapping=3.0)
    assert model.config._attn_implementation == "eager"
    items = random_items(5, seed=3)
    plain = computed(model, items, False)
    assert_equal(computed(model, items, True), plain, 1e-5)
    assert_equal(computed(model, items, True, per_row=[3, 2]), plain, 1e-5)
    assert not complaint_of_sharing(engine_of(model), items, 0, True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_groups_equal_plain_rows_with_dpo(attention: str) -> None:
    """The same holds for the DPO form, with its reference, and for both kernels, in float32."""
    items = [
        dataclasses.replace(i, reference=tuple(-float(len(r)) for r in i.responses)) for i in random_items(4, seed=5)
    ]
    model = network("llama", torch.float32)
    model.set_attn_implementation(attention)
    form = RankingForm("dpo", beta=0.3)
    shared, plain = computed(model, items, True, form), computed(model, items, False, form)
    assert shared[1] == pytest.approx(plain[1], abs=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(shared[2], plain[2], strict=True))


def test_a_group_counts_its_prompt_once() -> None:
    """P + sum (R_k - 1) real tokens instead of K P + sum (R_k - 1)."""
    item = next(i for i in random_items(9, seed=2) if len(i.responses) > 2)
    continued = sum(len(r) - 1 for r in item.responses)
    found = [collate([item], 0, shared).num_real_tokens for shared in (True, False)]
    assert found == [len(item.prompt) + continued, len(item.responses) * len(item.prompt) + continued]


class IgnoresMask(torch.nn.Module):
    """A network whose attention sees everything before it, whatever mask it is given."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.config = module.config

    def forward(self, attention_mask: Any, **inputs: Any) -> Any:
        return self.module(attention_mask=None, **inputs)


def engine_of(model: Any) -> TorchEngine:
    return TorchEngine(model, TrainTable())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_computes_groups_exactly_is_accepted(family: str) -> None:
    """The start-up check passes where the computation is exact."""
    assert not complaint_of_sharing(engine_of(network(family, torch.float32)), random_items(5, seed=3), 0, True)


@pytest.mark.parametrize(
    "model",
    [IgnoresMask(network("llama", torch.float32)), network("mpt", torch.float32), network("bloom", torch.float32)],
    ids=["ignores the mask", "mpt", "bloom"],
)
def test_a_model_that_does_not_gets_rows_of_its_own(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that ignores the mask, or reads positions from it, trains one response per row; the log says why."""
    monkeypatch.setattr(logging.getLogger("coalign"), "propagate", True)
    with caplog.at_level("INFO", logger="coalign"):
        settled = settle_layout(engine_of(model), random_items(5, seed=3), 0, TrainTable(), groups=True)
    assert (settled.shared_prefix, settled.pack_tokens) == (False, 0)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "a group's responses get rows of their own, since this model can't compute shared ones"
    ]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2"])
def test_layers_with_and_without_a_window_get_a_mask_each(family: str) -> None:
    """One layer sees four positions back, the other one everything."""
    one_of_two = {} if family == "gemma2" else {"use_sliding_window": True, "max_window_layers": 1}
    dtype, tolerance = (torch.float32, 1e-5) if family == "gemma2" else (torch.float64, 1e-9)
    model, items = network(family, dtype, sliding_window=4, **one_of_two), random_items(5, seed=3)
    assert sorted(layer_windows(model.config).values(), key=str) == [4, None]
    plain = computed(model, items, False)
    assert_equal(computed(model, items, True), plain, tolerance)
    assert_equal(computed(model, items, True, per_row=[2, 3]), plain, tolerance)
    assert not complaint_of_sharing(engine_of(model), items, 0, True)


@pytest.mark.parametrize(
    ("shared", "pack_tokens", "max_padding"), [(True, 0, None), (True, 40, 4), (False, 0, None), (False, 0, 4)]
)
def test_the_gradient_does_not_depend_on_the_split(shared: bool, pack_tokens: int, max_padding: int | None) -> None:
    """Any micro-batch size, packs and any number of ranks give one loss and one gradient, in float64."""
    model, items = network("llama"), random_items(13, seed=4)
    objective = align_objective(FORM, shared)
    _, expected_loss, expected = computed(model, items, shared)
    seen = set()
    for max_tokens in (1, 40, 10_000):
        for world in (1, 2, 3):
            dealt = micro_batches(items, max_tokens, world, shared, pack_tokens, max_padding)
            assert len(dealt) == world and len({len(part) for part in dealt}) == 1
            names = [item.name for mine in dealt for part in mine for item in part.items]
            assert sorted(names) == sorted(item.name for item in items)
            model.zero_grad()
            total = 0.0
            for mine in dealt:
                for part in (part for part in mine if part.items):
                    batch = collate(part.items, 0, shared, part.items_per_row)
                    logp_N = token_logps(model, batch)
                    loss, _ = objective.loss(logp_N, batch, part.items, objective.denominator(items))
                    loss.backward()
                    total += float(loss.detach())
            assert total == pytest.approx(expected_loss, abs=1e-9)
            for parameter, gradient in zip(model.parameters(), expected, strict=True):
                assert torch.allclose(parameter.grad, gradient, rtol=0, atol=1e-9)
            seen.add(sum(len(part) for part in dealt))
    assert len(seen) > 2


@pytest.mark.parametrize("shared", [True, False])
def test_micro_batches_stay_within_the_token_budget(shared: bool) -> None:
    """Padded tokens never exceed the budget, except for a single row that is longer."""
    items = random_items(40, seed=6)
    for part in (part for mine in micro_batches(items, 60, 2, shared) for part in mine if part.items):
        assert collate(part.items, 0, shared).input_ids_BT.numel() <= 60 or len(part.items) == 1


@pytest.mark.parametrize("world", [1, 2])
def test_padding_stays_within_its_limit(world: int) -> None:
    """A row much longer than the others is alone in its micro-batch, with packs and without, and widens none."""
    items = [*random_items(30, seed=6), dataclasses.replace(random_items(1)[0], name="long", prompt=(5,) * 90)]
    for pack_tokens in (0, 40):
        parts = [p for mine in micro_batches(items, 400, world, True, pack_tokens, 12) for p in mine if p.items]
        for part in parts:
            batch = collate(part.items, 0, True, part.items_per_row)
            assert batch.input_ids_BT.numel() - batch.num_real_tokens <= 12
            assert batch.input_ids_BT.shape[1] <= 40 or [item.name for item in part.items] == ["long"]
        assert sorted(i.name for part in parts for i in part.items) == sorted(item.name for item in items)
