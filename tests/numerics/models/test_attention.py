"""Masks of rows that items share: one rule against its slow twin, by blocks as by a dense mask."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import random
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from coalign.config import TrainTable
from coalign.models import attention
from coalign.models.attention import BLOCK, RowLayout, block_mask, dense_mask, use_blocks, uses_blocks
from coalign.models.logprobs import to_device, token_logps, widen
from coalign.models.sizes import padded_size
from coalign.training.layout_checks import complaint_of_sharing
from coalign.training.micro_batches import Item, collate
from numerics.engine import TorchEngine
from numerics.tiny import FAMILIES, network, random_items


def layout_of(items: list[Item], shared: bool, per_row: list[int]) -> RowLayout:
    layout = collate(items, 0, shared, per_row).attention_mask
    assert isinstance(layout, RowLayout)
    return layout


def slow_mask(items: list[Item], shared: bool, per_row: list[int], window: int | None) -> list[list[list[bool]]]:
    """Return who sees whom, from the items alone: every sequence is written out, and sees itself up to each token."""
    rows, width, first = [], 0, 0
    for count in per_row:
        row: list[tuple[int, int, int]] = []  # item, segment, position
        for number, item in enumerate(items[first : first + count]):
            row += [(number, 0, p) for p in range(len(item.prompt))]
            for segment, response in enumerate(item.responses if shared else item.responses[:1], start=1):
                row += [(number, segment, len(item.prompt) + p) for p in range(len(response) - 1)]
        rows.append(row)
        width, first = max(width, len(row)), first + count
    found = []
    for row in rows:
        padding = width - len(row)
        seen = [[a == b for b in range(width)] for a in range(width)]
        for a, (item, segment, position) in enumerate(row):
            for b, (other, of_other, there) in enumerate(row):
                # The sequence that ends in token a: its item's prompt and its own segment, in order.
                in_sequence = other == item and of_other in (0, segment) and (of_other, there) <= (segment, position)
                near = window is None or position - there < window
                seen[padding + a][padding + b] = in_sequence and near
        found.append(seen)
    return found


CASES = {
    "packed groups": (True, [2, 3, 1], None),
    "packed groups, sliding window": (True, [2, 3, 1], 4),
    "one group a row": (True, [1] * 6, None),
    "packed rows of SFT": (False, [3, 1, 2], None),
    "packed rows of SFT, sliding window": (False, [3, 1, 2], 3),
}


@pytest.mark.parametrize("case", CASES)
def test_masks_say_who_sees_whom(case: str) -> None:
    """The rule on all pairs of indices, the dense mask and the blocks equal the slow twin, padding included."""
    shared, per_row, window = CASES[case]
    items = random_items(6, seed=3)
    if not shared:
        items = [dataclasses.replace(item, responses=item.responses[:1]) for item in items]
    layout = layout_of(items, shared, per_row)
    expected = torch.tensor(slow_mask(items, shared, per_row, window)).unsqueeze(1)
    rows, width = layout.segments_BT.shape
    assert bool((layout.segments_BT < 0).any()), "some rows have padding"
    assert torch.equal(create_mask(layout.rule(window), rows, None, width, width, device="cpu"), expected)
    dense = dense_mask(layout, window, torch.float64)
    assert torch.equal(dense == 0, expected) and dense.max() == 0 and dense.min() == torch.finfo(torch.float64).min
    assert torch.equal(create_mask(block_mask(layout, window).mask_mod, rows, None, width, width, "cpu"), expected)


@pytest.mark.parametrize("window", [None, 5, 150, 400])
@pytest.mark.parametrize("shared", [True, False])
def test_blocks_are_those_that_the_rule_finds_pair_by_pair(shared: bool, window: int | None) -> None:
    """torch's create_block_mask is the slow twin: the same blocks are computed, and those without a mask are whole."""
    source = random.Random(6)
    for _ in range(6):
        items = []
        for number in range(source.randint(3, 6)):
            prompt = tuple(range(source.choice([1, 3, 130, 300, 520])))
            sizes = [source.choice([1, 2, 7, 129, 260]) for _ in range(source.randint(1, 4) if shared else 1)]
            items.append(Item(f"item{number}", prompt, tuple(tuple(range(size)) for size in sizes)))
        cut = source.randint(1, len(items) - 1)
        layout = layout_of(items, shared, [cut, len(items) - cut])
        rows, width = layout.segments_BT.shape
        expected = create_block_mask(layout.rule(window), rows, None, width, width, device="cpu")
        found = block_mask(layout, window)
        assert torch.equal(found.to_dense(), expected.to_dense())
        wholly = create_mask(layout.rule(window), rows, None, width, width, device="cpu").squeeze(1)
        for row, query, key in full_blocks(found):
            assert wholly[row, query * 128 : (query + 1) * 128, key * 128 : (key + 1) * 128].all()


def full_blocks(mask: BlockMask) -> list[tuple[int, int, int]]:
    """Return the blocks that are computed without a mask: row, query block, key block."""
    counts, order = mask.full_kv_num_blocks, mask.full_kv_indices
    assert counts is not None and order is not None
    places = itertools.product(range(counts.shape[0]), range(counts.shape[2]))
    return [(b, q, int(k)) for b, q in places for k in order[b, 0, q, : int(counts[b, 0, q])]]


def test_a_long_prompt_is_computed_without_a_mask_but_for_its_diagonal() -> None:
    """Blocks of a prompt before the query's own one; not with a window, nor across items."""
    items = [Item("long", tuple(range(512)), ((1, 2), (3, 4))), Item("next", (1,) * 130, ((1, 2), (3, 4)))]
    layout = layout_of(items, True, [2])
    before = [(0, q, k) for q in range(4) for k in range(q)]
    assert sorted(full_blocks(block_mask(layout, None))) == before
    assert full_blocks(block_mask(layout, 256)) == []


def test_blocks_that_nobody_sees_are_passed_over() -> None:
    """Of a row of four groups of 128 tokens the kernel computes the four blocks on the diagonal and no other."""
    items = [Item(f"item{n}", (5,) * 125, ((6, 7), (8, 9), (10, 11)), (2, 1, 0)) for n in range(4)]
    blocks = block_mask(layout_of(items, True, [4]), None)
    assert blocks.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1] and blocks.sparsity() == 75.0
    dense = blocks.to_dense()[0, 0]
    assert torch.equal(dense, torch.eye(4, dtype=dense.dtype))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", [*FAMILIES, "layers with and without a window"])
def test_attention_by_blocks_equals_dense_masks(family: str, case: str) -> None:
    """FlexAttention as torch computes it on a CPU, uncompiled and forward alone, through whole models in float64."""
    shared, per_row, window = CASES[case]
    options: dict[str, Any] = {}
    if family in ("mistral", "qwen2") and window:
        options = {"sliding_window": window}
    if family == "qwen2" and window:
        options |= {"use_sliding_window": True, "max_window_layers": 0}
    if family.startswith("layers"):
        options = {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1}
    model = network("qwen2" if family.startswith("layers") else family, **options)
    items = random_items(6, seed=3)
    if not shared:
        items = [dataclasses.replace(item, responses=item.responses[:1]) for item in items]
    batch = collate(items, 0, shared, per_row)
    with torch.no_grad():
        expected = token_logps(model, batch)
        assert use_blocks(model) and uses_blocks(model)
        found = token_logps(model, batch)
        plain = token_logps(model, collate(items, 0, False))  # under a plain mask it attends as before
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    assert torch.allclose(plain, expected, rtol=0, atol=1e-9)


def test_models_with_their_own_attention_go_on_as_they_are() -> None:
    for model in (network("gemma2", torch.float32), network("bloom", torch.float32)):
        before = model.config._attn_implementation
        assert not use_blocks(model) and model.config._attn_implementation == before


def test_padding_at_the_left_changes_nothing() -> None:
    model, batch = network("llama"), collate(random_items(5, seed=3), 0, True, [2, 3])
    wider = widen(batch, batch.input_ids_BT.shape[1] + 9)
    assert torch.allclose(token_logps(model, wider), token_logps(model, batch), rtol=0, atol=1e-9)


def test_rows_are_padded_to_few_widths() -> None:
    """A kernel is compiled for each: eight per octave, whole blocks, and an eighth of padding at most."""
    widths = range(1, 16_385)
    found = [padded_size(width, BLOCK) for width in widths]
    assert all(width <= wide and wide % 128 == 0 for width, wide in zip(widths, found, strict=True))
    assert all(wide <= max(width + 127, math.ceil(width * 1.125)) for width, wide in zip(widths, found, strict=True))
    assert len(set(found)) <= 8 * 4 + 8


@pytest.mark.parametrize("fault", ["it fails", "it is wrong"])
def test_blocks_that_are_not_exact_give_way_to_dense_masks(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel that can't be compiled, or computes something else, is left alone, and the log says so."""

    def broken(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        if fault == "it fails":
            raise RuntimeError("no compiler here")
        return torch.zeros_like(query)

    monkeypatch.setattr(attention, "flex_attention", broken)
    items = random_items(5, seed=3)
    for shared in (True, False):
        model = network("llama", torch.float32)
        assert use_blocks(model)
        single = [dataclasses.replace(item, responses=item.responses[:1]) for item in items]
        monkeypatch.setattr(logging.getLogger("coalign"), "propagate", True)
        caplog.clear()
        assert not complaint_of_sharing(TorchEngine(model, TrainTable()), items if shared else single, 0, shared)
        assert not uses_blocks(model) and "without FlexAttention" in caplog.text


def gpu_model(dtype: torch.dtype) -> Any:
    """Return a network whose heads are as large as the kernel wants them."""
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    return network("llama", dtype, **shape).to("cuda")


def long_items(count: int) -> list[Item]:
    """Return groups of a few hundred tokens."""
    source = random.Random(4)
    grown = []
    for item in random_items(count, seed=5):
        prompt = tuple(source.choices(range(3, 64), k=source.randint(40, 300)))
        grown.append(dataclasses.replace(item, prompt=prompt))
    return grown


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_compiled_blocks_equal_dense_masks_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    """Log-probs and gradients, of rows in several widths; what is allowed is a share of their size."""
    model = gpu_model(dtype)
    attention._compiled.cache_clear()
    torch._dynamo.reset()
    for count in (3, 5, 9, 12):
        items, found = long_items(count), []
        for by_blocks in (True, False):
            use_blocks(model) if by_blocks else attention.use_dense(model)
            batch = to_device(collate(items, 0, True, [count]), torch.device("cuda"))
            model.zero_grad()
            logp_N = token_logps(model, batch)
            logp_N.mean().backward()
            found.append((logp_N.detach(), [p.grad.clone() for p in model.parameters()]))
        for a, b in zip((found[0][0], *found[0][1]), (found[1][0], *found[1][1]), strict=True):
            assert float((a - b).abs().max()) <= tolerance * (1 + float(b.abs().max()))


@pytest.mark.gpu
def test_the_check_accepts_blocks_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    """In float32 and bfloat16 the kernel is exact enough, so that training uses it."""
    for dtype in (torch.float32, torch.bfloat16):
        model = gpu_model(dtype)
        engine = TorchEngine(model, TrainTable())
        engine.device = torch.device("cuda")
        assert use_blocks(model)
        assert not complaint_of_sharing(engine, long_items(6), 0, True)
        assert uses_blocks(model), caplog.text
