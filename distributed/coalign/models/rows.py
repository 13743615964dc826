"""Rows of tokens, which several items may share, as tensors; and which items share a row.

Knows token ids and lengths, no texts and no losses. Shape suffixes: B rows, T tokens, N wanted log-probs.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from coalign.models.attention import RowLayout
from coalign.models.logprobs import Batch


@dataclasses.dataclass
class TokenRow:
    """A row of a batch under construction: token ids, their positions, items and segments (see RowLayout)."""

    ids: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    items: list[int] = dataclasses.field(default_factory=list)
    segments: list[int] = dataclasses.field(default_factory=list)

    def append(self, ids: Sequence[int], position: int, item: int, segment: int) -> None:
        """Append tokens of one segment; `position` is that of the first."""
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.items += [item] * len(ids)
        self.segments += [segment] * len(ids)


def to_batch(
    rows: Sequence[TokenRow],
    places: Sequence[tuple[int, int, int]],
    owner: Sequence[int],
    pad_id: int,
    one_sequence_per_row: bool = False,
) -> Batch:
    """Return rows as tensors, with the places whose log-probs are wanted.

    `places` are (row, index in the row, token that is predicted there) and `owner` the response of each, in ascending
    order. With `one_sequence_per_row` a plain attention mask (B, T) takes the place of a layout.
    """
    width = max(len(row.ids) for row in rows)
    distance_N = torch.tensor([len(rows[row].ids) - where for row, where, _ in places])  # to the end of its row
    kept = int(distance_N.max())

    def padded(values: Callable[[TokenRow], list[int]], fill: int) -> Tensor:
        return torch.tensor([[fill] * (width - len(row.ids)) + values(row) for row in rows])

    segments_BT, positions_BT = padded(lambda row: row.segments, -1), padded(lambda row: row.positions, 0)
    layout = RowLayout(segments_BT, padded(lambda row: row.items, -1), positions_BT)
    return Batch(
        input_ids_BT=padded(lambda row: row.ids, pad_id),
        attention_mask=(segments_BT >= 0).long() if one_sequence_per_row else layout,
        position_ids_BT=positions_BT,
        num_kept=kept,
        kept_index_N=torch.tensor([row for row, _, _ in places]) * kept + kept - distance_N,
        target_N=torch.tensor([target for _, _, target in places]),
        response_N=torch.tensor(owner),
        num_responses=owner[-1] + 1,
        num_real_tokens=sum(len(row.ids) for row in rows),
    )


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Return packs of indices, each of at most `width` tokens, by best fit: longest first, each into the fullest pack.

    A length above `width` is a pack of its own.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, pack), in order
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect.bisect_left(rooms, (lengths[index], -1))
        if found == len(rooms):
            packs.append([])
            room, pack = width, len(packs) - 1
        else:
            room, pack = rooms.pop(found)
        packs[pack].append(index)
        bisect.insort(rooms, (room - lengths[index], pack))
    return packs


class TokenIds(Protocol):
    """The part of a codec that code on token ids reads: the padding id and the ids that end an answer."""

    pad_id: int
    stop_ids: list[int]


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and position_ids, each (B, T), with padding at the left."""
    width = max(len(row) for row in rows)
    ids_BT = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(dim=1) - 1).clamp(min=0),
    }
