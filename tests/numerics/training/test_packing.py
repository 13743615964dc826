"""Packed rows: what items that share a row give is what each gives alone, and packs and ranks are filled evenly."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from coalign.config import TrainTable
from coalign.models.logprobs import token_logps
from coalign.models.rows import best_fit
from coalign.training.layout_checks import complaint_of_sharing, settle_layout
from coalign.training.micro_batches import Item, MicroBatch, collate, micro_batches
from coalign.training.objectives import sft_objective
from numerics.engine import TorchEngine
from numerics.tiny import FAMILIES, network, random_ids, random_items


def sft_items(count: int, seed: int = 0) -> list[Item]:
    """Return rows of unlike lengths with one answer each, some of a single token."""
    return [dataclasses.replace(item, responses=item.responses[:1]) for item in random_items(count, seed)]


def lay_out(part: MicroBatch, shared_prefix: bool = False) -> Any:
    return collate(part.items, 0, shared_prefix, part.items_per_row)


def update(model: Any, items: Sequence[Item], *, pack_tokens: int, world: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of one SFT update."""
    objective = sft_objective()
    denominator = objective.denominator(items)
    model.zero_grad()
    total = 0.0
    for part in itertools.chain(*micro_batches(items, 60, world, False, pack_tokens)):
        if part.items:
            batch = lay_out(part)
            loss, _ = objective.loss(token_logps(model, batch), batch, part.items, denominator)
            loss.backward()
            total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_gradient_of_separate_ones(family: str) -> None:
    """Loss and every gradient agree in float64 with a row for each item, for any width and number of ranks."""
    model, items = network(family), sft_items(11, seed=7)
    expected_loss, expected = update(model, items, pack_tokens=0, world=1)
    for pack_tokens, world in [(20, 1), (60, 2)]:
        loss, found = update(model, items, pack_tokens=pack_tokens, world=world)
        assert loss == pytest.approx(expected_loss, abs=1e-9)
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=0, atol=1e-9), name


def test_packed_rows_in_float32() -> None:
    """The same holds in float32 to 1e-5 of the gradient's size."""
    model, items = network("llama", torch.float32), sft_items(11, seed=7)
    expected_loss, expected = update(model, items, pack_tokens=0, world=1)
    loss, found = update(model, items, pack_tokens=40, world=2)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert all(torch.allclose(found[n], g, rtol=0, atol=1e-5 * float(g.abs().max() + 1)) for n, g in expected.items())


def test_items_of_a_row_see_nothing_of_one_another() -> None:
    """A change in one item leaves the others' log-probs as they are, to the last bit."""
    model, items = network("llama"), sft_items(3, seed=1)
    other = dataclasses.replace(items[0], prompt=random_ids(random.Random(9), len(items[0].prompt)))
    logps = [token_logps(model, collate([i, *items[1:]], 0, False, [3])) for i in (items[0], other)]
    start = items[0].num_response_tokens
    assert not torch.equal(logps[0][:start], logps[1][:start])
    assert torch.equal(logps[0][start:], logps[1][start:])


def test_best_fit_packs_every_item_once() -> None:
    """No pack exceeds the width, and few are opened: within the known bound of 11/9 of what is needed at least."""
    source = random.Random(0)
    lengths = [source.randint(1, 60) for _ in range(500)]
    packs = best_fit(lengths, 64)
    assert sorted(i for pack in packs for i in pack) == list(range(500))
    assert max(sum(lengths[i] for i in pack) for pack in packs) <= 64
    assert len(packs) <= 11 / 9 * sum(lengths) / 64 + 1


@pytest.mark.parametrize("pack_tokens", [0, 25, 60])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_get_even_shares_within_the_budget(pack_tokens: int, world: int) -> None:
    """Every item is dealt out once, ranks take equally many steps of at most 60 padded tokens, and about as many."""
    items = sft_items(64, seed=3)
    dealt = micro_batches(items, 60, world, False, pack_tokens)
    assert sorted(i.name for mine in dealt for part in mine for i in part.items) == sorted(i.name for i in items)
    assert len({len(mine) for mine in dealt}) == 1
    batches = [[lay_out(part) for part in mine if part.items] for mine in dealt]
    every = [batch for mine in batches for batch in mine]
    assert all(batch.input_ids_BT.numel() <= 60 for batch in every)
    if pack_tokens:
        assert all(batch.input_ids_BT.shape[1] <= pack_tokens for batch in every)
        real = sum(batch.num_real_tokens for batch in every)
        padded = sum(batch.input_ids_BT.numel() for batch in every)
        assert real / padded > 0.9
    shares = [sum(batch.input_ids_BT.numel() for batch in mine) for mine in batches]
    assert max(shares) <= 1.1 * sum(shares) / world


def test_one_update_that_fits_one_rank_is_shared_by_two() -> None:
    """Packs and micro-batches become smaller, so that no rank waits for the other."""
    dealt = micro_batches(sft_items(12, seed=3), 8192, 2, False, 4096)
    sizes = [[lay_out(part).input_ids_BT.numel() for part in mine] for mine in dealt]
    assert [len(mine) for mine in sizes] == [1, 1] and sizes[0][0] == pytest.approx(sizes[1][0], rel=0.1)


def engine_of(model: Any) -> TorchEngine:
    return TorchEngine(model, TrainTable())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_computes_packs_exactly_is_accepted(family: str) -> None:
    assert not complaint_of_sharing(engine_of(network(family, torch.float32)), sft_items(5, seed=3), 0, False)


@pytest.mark.parametrize("error", [RuntimeError, KeyError, AttributeError, None])
def test_a_model_that_does_not_is_trained_unpacked(
    error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that reads positions from the mask, or fails at it with whatever error, gets one item per row."""
    model = network("bloom" if error is None else "llama", torch.float32)
    forward = model.forward

    def refuse(attention_mask: Any, **inputs: Any) -> Any:
        if error is not None and attention_mask.ndim == 4:
            raise error("of the model's own\nand its details")
        return forward(attention_mask=attention_mask, **inputs)

    monkeypatch.setattr(model, "forward", refuse)
    monkeypatch.setattr(logging.getLogger("coalign"), "propagate", True)
    with caplog.at_level("INFO", logger="coalign"):
        settled = settle_layout(engine_of(model), sft_items(5, seed=3), 0, TrainTable(), groups=False)
    assert settled.pack_tokens == 0
    (record,) = caplog.records
    assert record.message.startswith("items get rows of their own") and "\n" not in record.message


def test_the_settings_stay_where_they_are_exact() -> None:
    """Whatever the user chose is kept, and unpacked training asks nothing."""
    engine = engine_of(network("llama", torch.float32))
    for train in (TrainTable(), TrainTable(pack_tokens=64)):
        assert settle_layout(engine, sft_items(5, seed=3), 0, train, groups=False) == train
    unpacked = TrainTable(pack_tokens=0)
    bloom = engine_of(network("bloom", torch.float32))
    assert settle_layout(bloom, sft_items(5, seed=3), 0, unpacked, groups=False) == unpacked


def test_rows_longer_than_a_sliding_window_are_packed() -> None:
    """The window counts an item's own positions."""
    model, items = network("mistral", sliding_window=4), sft_items(9, seed=3)
    assert not complaint_of_sharing(engine_of(model), items, 0, False)
    alone = [token_logps(model, collate([item], 0, False)) for item in items]
    packed = token_logps(model, collate(items, 0, False, [9]))
    assert torch.allclose(packed, torch.cat(alone), rtol=0, atol=1e-9)
