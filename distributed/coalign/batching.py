"""Items into batches: one layout for SFT rows and shared-prefix groups, token-budget micro-batches, a resumable order.

Used by training and the recipes. Knows no files and no engine. Shape suffixes: B rows, T tokens, K kept positions,
N response tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from coalign.attention import group_mask
from coalign.logprobs import Batch


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt and the responses under it, as token ids; `rewards` and `best` (an index) for groups.

    `reference` holds the reference model's summed log-prob of each response (DPO).
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
    """Return (tokens in a row, rows) that an item takes. A response's last token is never an input."""
    if shared_prefix:
        return len(item.prompt) + sum(len(r) - 1 for r in item.responses), 1
    return max(len(item.prompt) + len(r) - 1 for r in item.responses), len(item.responses)


def collate(items: Sequence[Item], pad_id: int, shared_prefix: bool, dtype: torch.dtype) -> Batch:
    """Lay items out for one forward pass; responses are numbered in order over all items.

    With `shared_prefix` a row is one prompt and all its responses side by side, each seeing the prompt and itself,
    positions restarting after the prompt; without it a row is the prompt and one response.
    """
    rows: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions, segments
    places: list[tuple[int, int, int]] = []  # row, distance from the row's end, target
    owner: list[int] = []
    count = 0
    for item in items:
        for responses in [item.responses] if shared_prefix else [(r,) for r in item.responses]:
            length = len(item.prompt)
            ids, positions, segments = list(item.prompt), list(range(length)), [0] * length
            offsets = []
            for number, response in enumerate(responses, start=1):
                # The first token is predicted by the prompt's last position, the others inside the segment.
                offsets.append([length - 1, *range(len(ids), len(ids) + len(response) - 1)])
                ids += response[:-1]
                positions += range(length, length + len(response) - 1)
                segments += [number] * (len(response) - 1)
            for response, where in zip(responses, offsets, strict=True):
                places += [(len(rows), len(ids) - w, t) for w, t in zip(where, response, strict=True)]
                owner += [count] * len(response)
                count += 1
            rows.append((ids, positions, segments))
    return _to_batch(rows, places, owner, pad_id, dtype if shared_prefix else None)


def _to_batch(
    rows: list[tuple[list[int], list[int], list[int]]],
    places: list[tuple[int, int, int]],
    owner: list[int],
    pad_id: int,
    mask_dtype: torch.dtype | None,
) -> Batch:
    width = max(len(ids) for ids, _, _ in rows)
    kept = max(distance for _, distance, _ in places)

    def padded(column: int, fill: int) -> Tensor:
        return torch.tensor([[fill] * (width - len(row[column])) + row[column] for row in rows])

    segments_BT = padded(2, -1)
    return Batch(
        input_ids_BT=padded(0, pad_id),
        attention_mask=(segments_BT >= 0).long() if mask_dtype is None else group_mask(segments_BT, mask_dtype),
        position_ids_BT=padded(1, 0),
        num_kept=kept,
        kept_index_N=torch.tensor([row * kept + kept - distance for row, distance, _ in places]),
        target_N=torch.tensor([target for _, _, target in places]),
        response_N=torch.tensor(owner),
        num_responses=owner[-1] + 1,
        num_real_tokens=sum(len(ids) for ids, _, _ in rows),
    )


def micro_batches(items: Sequence[Item], max_tokens: int, world: int, shared_prefix: bool) -> list[list[list[Item]]]:
    """Cut one update's items into micro-batches and deal them out: result[rank] is that rank's list.

    Items of like length go together, padded tokens stay within `max_tokens` (a longer item goes alone). Every rank
    gets as many micro-batches; an empty one stands for "nothing left", so that collectives match.
    """
    sized = sorted(
        ((row_tokens(item, shared_prefix), i) for i, item in enumerate(items)), key=lambda s: (-s[0][0], s[1])
    )
    # As many micro-batches as ranks at least, else one rank would work while the others wait.
    share = sum(tokens * rows for (tokens, rows), _ in sized) // world + 1
    limit = min(max_tokens, max(share, sized[0][0][0] * sized[0][0][1]))
    cut: list[list[Item]] = []
    width = rows = 0
    for (tokens, count), i in sized:
        if not cut or max(width, tokens) * (rows + count) > limit:
            cut.append([])
            width, rows = 0, 0
        cut[-1].append(items[i])
        width, rows = max(width, tokens), rows + count
    cut += [[] for _ in range(-len(cut) % world)]
    return [cut[rank::world] for rank in range(world)]


def permutations(num_items: int, seed: int) -> Iterator[int]:
    """Yield indices without end: one seeded permutation of all items after another."""
    for epoch in itertools.count():
        yield from np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_items).tolist()
