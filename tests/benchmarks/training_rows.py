"""Rows about updates of either stage: shared prefixes in time and memory, packed SFT, ranking against SFT.

Both sides go through training's own update (forward, backward, clipping, AdamW) with the same log-probs; what differs
is how rows are laid out. The learning rate is 0, so that every round does the same work.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from unittest import mock

import torch

from benchmarks.networks import LARGE, PAD, SMALL, TINY, Shape, make_network
from benchmarks.rows import Row, Side, peak_mebibytes
from benchmarks.workloads import equal_items, even_groups, real_groups, sft_items, token_ratio
from coalign.config import TrainTable
from coalign.models.logprobs import to_device, token_logps
from coalign.training import micro_batches
from coalign.training.loop import _update
from coalign.training.losses import RankingForm
from coalign.training.micro_batches import Item, collate, row_tokens
from coalign.training.objectives import Objective, align_objective, sft_objective
from numerics.engine import TorchEngine

TABLE = TrainTable(precision="float32")  # all else by default: micro-batches of 8192 tokens, packs of 256 on a CPU
PLAIN_ROWS = 16  # of a padded batch
LIMIT = 8192  # padded tokens of the plain side's one micro-batch in the memory rows

Update = dict[str, float]


class GradientEngine(TorchEngine):
    """Leaves gradients where they are and takes no step, so that what is measured is the passes alone."""

    def step(self, learning_rate: float) -> float:
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None]))
        self.optimizer.zero_grad(set_to_none=False)
        return norm


def update(engine: TorchEngine, items: Sequence[Item], objective: Objective, table: TrainTable = TABLE) -> Update:
    """Make one update and return what is logged of it."""
    return _update(engine, items, objective, PAD, table, 0.0)


def same_update(a: Update, b: Update) -> bool:
    """Return whether loss and gradient norm are equal to a thousandth of a percent."""
    return all(abs(a[key] - b[key]) <= 1e-5 * max(1.0, abs(a[key])) for key in ("loss", "grad_norm"))


def align_sides(engine: TorchEngine, groups: Sequence[Item]) -> tuple[Side, Side]:
    """Return an update of stage 2 with one row per response, and with shared prefixes."""
    form = RankingForm()
    plain, shared = align_objective(form, shared_prefix=False), align_objective(form, shared_prefix=True)
    return Side(lambda: update(engine, groups, plain)), Side(lambda: update(engine, groups, shared))


def align_row(engine: TorchEngine, shape: Shape, what: str, groups: list[Item], max_repeats: int = 100) -> Row:
    """Return the time of an align step."""
    plain, ours = align_sides(engine, groups)
    ratio = token_ratio(groups)
    name = f"align step, {len(groups)} {what}, {shape.name}, token ratio {ratio:.2f}"
    against = "one row per response, length-sorted, padded"
    return Row(name, against, 0.9 * ratio, ours, plain, same_update, max_repeats=max_repeats)


def align_rows(shape: Shape, tiny: bool) -> list[Row]:
    """Return the align step on groups as rank makes them, and on groups of one size."""
    shape = TINY if tiny else shape
    count, repeats = (2, 1) if tiny else (8, 2) if shape is LARGE else (16, 100)
    return [
        align_row(TorchEngine(make_network(shape), TABLE), shape, what, groups, repeats)
        for what, groups in (
            ("real groups", real_groups(count, shape)),
            ("groups K=8 P=132 R=6", even_groups(count, shape)),
        )
    ]


def fill_micro_batch(groups: Sequence[Item], limit: int) -> list[Item]:
    """Return the first groups that one row per response brings up to `limit` padded tokens, one at least."""
    chosen: list[Item] = []
    for group in groups:
        sizes = [row_tokens(item, shared_prefix=False) for item in [*chosen, group]]
        if chosen and max(width for width, _ in sizes) * sum(rows for _, rows in sizes) > limit:
            break
        chosen.append(group)
    return chosen


def at_once(side: Side) -> Side:
    """Return the side with micro-batches that padding does not end."""

    def work() -> Update:
        with mock.patch.multiple(micro_batches, PADDING_ON_CPU=LIMIT, PADDING_SHARE_ON_GPU=1.0):
            return side.work()

    return Side(work)


def memory_row(shape: Shape, what: str, groups: list[Item], tiny: bool) -> Row:
    """Return what the passes of an align step hold at most, beside weights, gradients and optimizer."""
    engine = GradientEngine(make_network(shape), TABLE)
    for parameter in engine.trained:
        parameter.grad = torch.zeros_like(parameter)
    plain, ours = (at_once(side) for side in align_sides(engine, groups))
    return Row(
        f"align step, peak tensor MiB, {len(groups)} {what}, {shape.name}",
        "one row per response, one micro-batch of 8,192 tokens",
        1 / 3,
        ours,
        plain,
        same_update,
        at_most=True,
        unit="MiB",
        measure=peak_mebibytes,
        warm_up=False,
        max_repeats=1,
    )


def align_memory_rows(tiny: bool) -> list[Row]:
    """Return the memory of an align step on groups as rank makes them, and on groups of one size."""
    shape, limit = (TINY, 600) if tiny else (SMALL, LIMIT)
    groups = fill_micro_batch(real_groups(64, shape), limit)
    even = fill_micro_batch(even_groups(64, shape), limit)
    return [memory_row(shape, "real groups", groups, tiny), memory_row(shape, "groups K=8 P=132 R=6", even, tiny)]


def padded_update(engine: TorchEngine, items: Sequence[Item]) -> Update:
    """Make one update of stage 1 from padded batches of PLAIN_ROWS in the order given."""
    objective = sft_objective()
    tokens = objective.denominator(items)
    total = 0.0
    for start in range(0, len(items), PLAIN_ROWS):
        part = items[start : start + PLAIN_ROWS]
        batch = to_device(collate(part, PAD, False), engine.device)
        loss, _ = objective.loss(token_logps(engine.model, batch), batch, part, tokens)
        engine.backward(loss, last=start + PLAIN_ROWS >= len(items))
        total += float(loss.detach())
    return {"loss": total, "grad_norm": engine.step(0.0)}


def num_tokens(items: Sequence[Item]) -> int:
    """Return the tokens of all rows without padding."""
    return sum(row_tokens(item, shared_prefix=True)[0] for item in items)


def over_updates(make: Callable[[Sequence[Item]], Update], items: Sequence[Item], size: int) -> Callable[[], Update]:
    """Return work that makes one update after another; what it found is the sum over them."""

    def work() -> Update:
        found = [make(items[i : i + size]) for i in range(0, len(items), size)]
        return {key: sum(one[key] for one in found) for key in ("loss", "grad_norm")}

    return work


def sft_rows(tiny: bool) -> list[Row]:
    """Return packed SFT against padded batches of the same rows, and against rows that need no padding."""
    shape, size = (TINY, 8) if tiny else (SMALL, 32)  # 32: the default of sft.batch_rows
    return packing_rows(TorchEngine(make_network(shape), TABLE), shape, size)


def packing_rows(engine: TorchEngine, shape: Shape, size: int) -> list[Row]:
    """Return the rows of stage 1 on an engine, `size` rows per update."""
    items = sft_items(3 * size, shape)
    mean = round(num_tokens(items) / len(items))
    answer = round(sum(item.num_response_tokens for item in items) / len(items))
    even = equal_items(3 * size, mean - answer + 1, answer, shape)
    packed = functools.partial(update, engine, objective=sft_objective())
    unpadded = functools.partial(packed, table=TABLE.model_copy(update={"pack_tokens": 0}))
    ours = Side(over_updates(packed, items, size), num_tokens(items))
    padded = Side(over_updates(functools.partial(padded_update, engine), items, size), num_tokens(items))
    without = Side(over_updates(unpadded, even, size), num_tokens(even))
    name = f"packed SFT, real tokens/s, 3 updates of {size}, {shape.name}"
    return [
        Row(name, f"padded batches of {PLAIN_ROWS} in random order", 2.0, ours, padded, same_update),
        Row(name, f"rows all of {mean} tokens, no padding", 0.9, ours, without, finite),
    ]


def finite(a: Update, b: Update) -> bool:
    """Return whether both sides found a loss: their rows are not the same, only equally many tokens."""
    return all(x["loss"] == x["loss"] and x["grad_norm"] > 0 for x in (a, b))


def ranking_rows(tiny: bool) -> list[Row]:
    """Return stage 2 against stage 1, each on rows of the same lengths."""
    shape, count = (TINY, 2) if tiny else (SMALL, 32)
    return [ranking_row(TorchEngine(make_network(shape), TABLE), shape, count)]


def ranking_row(engine: TorchEngine, shape: Shape, count: int) -> Row:
    """Return stage 2 against stage 1 on an engine."""
    groups = real_groups(count, shape)
    source = random.Random(1)
    rows = [item_of_same_length(group, shape, source) for group in groups]
    ranking, sft = align_objective(RankingForm(), shared_prefix=True), sft_objective()
    ours = Side(lambda: update(engine, groups, ranking), num_tokens(groups))
    plain = Side(lambda: update(engine, rows, sft), num_tokens(rows))
    name = f"ranking, real tokens/s, {count} real groups, {shape.name}"
    return Row(name, "our own SFT, rows as long as the groups'", 0.9, ours, plain, finite)


def item_of_same_length(group: Item, shape: Shape, source: random.Random) -> Item:
    """Return an SFT row that takes as many tokens as a group and answers as many of them, less one per response."""
    answer = 1 + sum(len(response) - 1 for response in group.responses)
    return Item(group.name, group.prompt, (tuple(source.choices(group.prompt, k=answer)),))


BUILDERS: dict[str, Callable[[bool], list[Row]]] = {
    "align": functools.partial(align_rows, SMALL),
    "align-100m": functools.partial(align_rows, LARGE),
    "align-memory": align_memory_rows,
    "sft": sft_rows,
    "ranking": ranking_rows,
}
