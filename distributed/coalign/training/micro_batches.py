"""Items to batches: collating SFT rows and shared-prefix groups, packing, micro-batches within a token budget, order.

Knows the Engine protocol for its device and attention, no files and no losses.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from coalign.config import TrainTable
from coalign.models.attention import uses_blocks
from coalign.models.logprobs import Batch, to_device
from coalign.models.rows import TokenRow, best_fit, to_batch
from coalign.models.sizes import PACK_ON_CPU, PACK_UNDER_MASK
from coalign.process import world_size
from coalign.training.engine import Engine

# The most padding in a micro-batch, in tokens or as a share: about the cost of one more micro-batch.
PADDING_ON_CPU, PADDING_SHARE_ON_GPU = 64, 1 / 8


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt and its responses, as token ids: a row of SFT with one response, or a group.

    Groups have one reward per response, and `best` is the index of the best response. `reference` holds the reference
    model's summed log-prob of each response, in nats (DPO).
    """

    name: str
    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    rewards: tuple[int, ...] = ()
    best: int = 0
    reference: tuple[float, ...] = ()

    @property
    def num_response_tokens(self) -> int:
        """Return how many tokens the loss covers."""
        return sum(len(response) for response in self.responses)

    def longest(self) -> int:
        """Return the tokens of the prompt and its longest response."""
        return len(self.prompt) + max(len(response) for response in self.responses)


def row_tokens(item: Item, shared_prefix: bool) -> tuple[int, int]:
    """Return (tokens per row, rows) of an item. A response's last token is never an input."""
    if shared_prefix:
        return len(item.prompt) + sum(len(r) - 1 for r in item.responses), 1
    return max(len(item.prompt) + len(r) - 1 for r in item.responses), len(item.responses)


def collate(
    items: Sequence[Item], pad_id: int, shared_prefix: bool, items_per_row: Sequence[int] | None = None
) -> Batch:
    """Return the batch of one forward pass over items; responses are numbered in order over all items.

    With `shared_prefix` an item is one prompt followed by all its responses. Each response sees the prompt and itself,
    and its positions restart after the prompt. Without it every response gets a copy of the prompt. `items_per_row`
    gives the number of consecutive items in each row, which do not see one another; without it each has its own row.
    """
    rows: list[TokenRow] = []
    places: list[tuple[int, int, int]] = []  # row, index in the row, target
    owner: list[int] = []
    parts = [(i.prompt, rs) for i in items for rs in ([i.responses] if shared_prefix else [(r,) for r in i.responses])]
    row_starts = set(itertools.accumulate(items_per_row or [1] * len(parts), initial=0))
    for index, (prompt, responses) in enumerate(parts):
        if index in row_starts:
            rows.append(TokenRow())
        row = rows[-1]
        row.append(prompt, 0, index, 0)
        last = len(row.ids) - 1  # the prompt's last token predicts every response's first
        for segment, response in enumerate(responses, start=1):
            where = [last, *range(len(row.ids), len(row.ids) + len(response) - 1)]
            places += [(len(rows) - 1, w, t) for w, t in zip(where, response, strict=True)]
            owner += [owner[-1] + 1 if owner else 0] * len(response)
            row.append(response[:-1], len(prompt), index, segment)
    return to_batch(rows, places, owner, pad_id, one_sequence_per_row=not shared_prefix and len(rows) == len(parts))


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Items of one forward pass, in the order of their rows, and how many share each row (None: none do)."""

    items: tuple[Item, ...] = ()
    items_per_row: tuple[int, ...] | None = None


def micro_batches(
    items: Sequence[Item],
    max_tokens: int,
    world: int,
    shared_prefix: bool,
    pack_tokens: int = 0,
    max_padding: int | None = None,
) -> list[list[MicroBatch]]:
    """Cut one update's items into micro-batches and deal them out: result[rank] is that rank's list.

    Items share rows of up to `pack_tokens` tokens (0: no sharing). Rows of similar length go together. The padded
    tokens of a micro-batch stay within `max_tokens`, unless it is a single longer row; its padding stays within
    `max_padding` (None: no limit). All ranks get equally many micro-batches with about equally many tokens; empty ones
    fill up, so that collectives match.
    """
    sizes = [row_tokens(item, shared_prefix) for item in items]
    padding = max_tokens if max_padding is None else max_padding
    packing = pack_tokens > 0 and all(rows == 1 for _, rows in sizes)
    if packing:
        packs = _even_packs([tokens for tokens, _ in sizes], min(pack_tokens, max_tokens), world)
        sizes = [(sum(sizes[i][0] for i in pack), 1) for pack in packs]
    else:
        packs = [[i] for i in range(len(items))]
    dealt = _deal(_cut(packs, sizes, max_tokens, padding, world), sizes, world)
    return [
        [
            MicroBatch(
                tuple(items[i] for p in part for i in packs[p]),
                tuple(len(packs[p]) for p in part) if packing and part else None,
            )
            for part in mine
        ]
        for mine in dealt
    ]


def _cut(
    packs: Sequence[Sequence[int]], sizes: Sequence[tuple[int, int]], limit: int, max_padding: int, world: int
) -> list[list[int]]:
    """Return packs by micro-batch, as even as possible, their number a multiple of the ranks where possible."""
    order = sorted(range(len(packs)), key=lambda p: (-sizes[p][0], packs[p]))

    def cut(limit: int) -> list[list[int]]:
        parts: list[list[int]] = []
        width = rows = padding = 0
        for p in order:
            tokens, count = sizes[p]
            padding += (width - tokens) * count
            if not parts or width * (rows + count) > limit or padding > max_padding:
                parts.append([])
                width, rows, padding = tokens, 0, 0  # the longest comes first
            parts[-1].append(p)
            rows += count
        return parts

    largest = max(_cost([p], sizes) for p in order)
    parts = cut(_smallest(largest, max(limit, largest), world, lambda limit: len(cut(limit))))
    while len(parts) % world and (several := [part for part in parts if len(part) > 1]):
        part = max(several, key=lambda part: _cost(part, sizes))
        parts.remove(part)
        parts += [part[: len(part) // 2], part[len(part) // 2 :]]
    return parts


def _cost(part: Sequence[int], sizes: Sequence[tuple[int, int]]) -> int:
    """Return the padded tokens of a micro-batch."""
    return max((sizes[p][0] for p in part), default=0) * sum(sizes[p][1] for p in part)


def _deal(parts: Sequence[list[int]], sizes: Sequence[tuple[int, int]], world: int) -> list[list[list[int]]]:
    """Return micro-batches by rank, equally many: largest first, the rank with the least so far takes the largest."""
    order = sorted([*parts, *[[] for _ in range(-len(parts) % world)]], key=lambda part: (-_cost(part, sizes), part))
    dealt: list[list[list[int]]] = [[] for _ in range(world)]
    for start in range(0, len(order), world):
        ranks = sorted(range(world), key=lambda rank: sum(_cost(part, sizes) for part in dealt[rank]))
        for rank, part in zip(ranks, order[start : start + world], strict=True):
            dealt[rank].append(part)
    return dealt


def _even_packs(lengths: Sequence[int], pack_tokens: int, world: int) -> list[list[int]]:
    """Return best-fit packs, as even as possible without increasing their number rounded up to a multiple of the ranks.

    A length above `pack_tokens` has a row of its own and does not widen the others.
    """
    longest = max((length for length in lengths if length <= pack_tokens), default=pack_tokens)
    width = _smallest(longest, pack_tokens, world, lambda width: len(best_fit(lengths, width)))
    return best_fit(lengths, width)


def _smallest(low: int, high: int, world: int, count: Callable[[int], int]) -> int:
    """Return the smallest size with no more parts than `high` gives, rounded up to a multiple of `world`."""
    allowed = -(-count(high) // world) * world
    return low + bisect.bisect_left(range(low, high), True, key=lambda size: count(size) <= allowed)


def permutations(num_items: int, seed: int) -> Iterator[int]:
    """Yield indices without end: one seeded permutation of all items per epoch."""
    for epoch in itertools.count():
        yield from np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_items).tolist()


def pack_budget(engine: Engine, settings: TrainTable) -> tuple[int, int]:
    """Return the most tokens of a row that items share, and the most padding of a micro-batch, in tokens.

    Under block masks a row may be as wide as a micro-batch at no extra cost; under a dense mask rows stay narrow.
    """
    whole = settings.micro_batch_tokens
    if engine.device.type == "cpu":
        widest, padding = PACK_ON_CPU, PADDING_ON_CPU * world_size()
    else:
        widest, padding = PACK_UNDER_MASK, round(whole * PADDING_SHARE_ON_GPU)
    if settings.pack_tokens >= 0:
        widest = settings.pack_tokens
    if settings.pack_tokens and uses_blocks(engine.model):
        widest = whole
    return min(widest, whole), padding


def batch_of(
    engine: Engine, part: MicroBatch, filler: Item, pad_id: int, shared_prefix: bool
) -> tuple[Batch, tuple[Item, ...]]:
    """Return a micro-batch on the device and its items; an empty one gets `filler`, so that collectives match."""
    items = part.items or (filler,)
    return to_device(collate(items, pad_id, shared_prefix, part.items_per_row), engine.device), items
