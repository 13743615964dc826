"""A KV cache of slots: rows enter and leave while the others keep their places.

All rows end in the same column: a row of n tokens occupies the n columns before `high`. So the next token of all rows
goes into one column, and no row is padded beyond the longest. The distance of two columns is the distance of their
positions, as sliding windows and ALiBi need it. Knows no token ids and no sampling.
Shape suffixes: S slots, R live rows, H heads, C columns, D head size, B prefilled prompts, T columns that are read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from coalign.generation.cascade_attention import SharedPrompts


class SlotMemory(Protocol):
    """Memory for the slots of a cache that allocates none of its own."""

    def room(self, slots: int, columns: int) -> tuple[int, int]:
        """Return the slots and columns to allocate when at least these are needed."""

    def take(self, place: int, like_SHCD: Tensor, slots: int, columns: int) -> Tensor:
        """Return zeroed memory for a layer's keys or values: like `like_SHCD`, with these slots and columns."""


@dataclasses.dataclass
class _Extent:
    """The part of the slots in use: the first `rows`, columns from `low` to before `high`."""

    rows: int = 0
    low: int = 0
    high: int = 0


class _SlotLayer(DynamicLayer):
    """One layer's keys and values, (S, H, C, D) each; zeros where no row lives, because NaN would survive the mask."""

    keys: Tensor
    values: Tensor

    def __init__(self, extent: _Extent, keys_SHCD: Tensor, values_SHCD: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.extent = extent
        self.keys, self.values, self.is_initialized = keys_SHCD, values_SHCD, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token per row into column `high`; return the columns that rows may read: (R, H, T, D) each."""
        extent = self.extent
        rows, end = slice(extent.rows), extent.high + 1
        self.keys[rows, :, extent.high : end] = key_states
        self.values[rows, :, extent.high : end] = value_states
        return self.keys[rows, :, extent.low : end], self.values[rows, :, extent.low : end]

    def get_seq_length(self) -> int:
        """Return the number of columns read beside the new one."""
        return self.extent.high - self.extent.low

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns read, and the mask's offset, which is 0."""
        return self.get_seq_length() + query_length, 0

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy rows `sources` into rows `targets`."""
        columns = slice(self.extent.low, self.extent.high)
        for states in (self.keys, self.values):
            states[targets, :, columns] = states[sources, :, columns]

    def shift(self, columns: int) -> None:
        """Move the part in use to the left by `columns`."""
        extent = self.extent
        for states in (self.keys, self.values):
            kept = states[: extent.rows, :, extent.low : extent.high].clone()
            states[: extent.rows, :, extent.low - columns : extent.high - columns] = kept
            states[:, :, extent.high - columns : extent.high] = 0

    def admit(self, prefilled: Any, source_R: Tensor) -> None:
        """Append rows: copies of prefilled prompts, aligned at the right."""
        extent, width = self.extent, prefilled.keys.shape[2]
        rows, columns = slice(extent.rows, extent.rows + len(source_R)), slice(extent.high - width, extent.high)
        source_R = source_R.to(self.keys.device)  # a layer may lie on another GPU than the first
        self.keys[rows, :, columns] = prefilled.keys[source_R]
        self.values[rows, :, columns] = prefilled.values[source_R]

    def clear(self, rows: slice) -> None:
        """Zero these slots, which earlier rows have left."""
        self.keys[rows], self.values[rows] = 0, 0

    def resize(self, take: Callable[[int, Tensor], Tensor]) -> None:
        """Move the part in use to column 0 of other memory: keys to `take(0, keys)`, values to `take(1, values)`."""
        self.keys, self.values = (self._moved(states, take, k) for k, states in enumerate((self.keys, self.values)))

    def _moved(self, states_SHCD: Tensor, take: Callable[[int, Tensor], Tensor], place: int) -> Tensor:
        extent = self.extent
        used = states_SHCD[: extent.rows, :, extent.low : extent.high].clone()  # the new memory may be the same
        taken_SHCD = take(place, states_SHCD)
        taken_SHCD[: extent.rows, :, : extent.high - extent.low] = used
        return taken_SHCD


class SlotCache(Cache):
    """The KV cache that a model's forward pass reads and writes while rows enter, advance by a token and leave.

    `start_R` is the column of each row's first token. With `prompts` the prompts' keys and values are kept there, and
    slots hold only the tokens after them. With `memory` slots are allocated there.
    """

    def __init__(
        self, device: torch.device, prompts: SharedPrompts | None = None, memory: SlotMemory | None = None
    ) -> None:
        super().__init__(layers=[])
        self._own_layers: list[_SlotLayer] = []
        self.prompts, self._memory = prompts, memory
        self.extent = _Extent()
        self.num_slots = self.num_columns = 0
        self._starts: list[int] = []
        self.start_R = torch.zeros(0, dtype=torch.long, device=device)

    def admit(
        self, prefilled: DynamicCache, lengths: Sequence[int], source: Sequence[int], room: tuple[int, int]
    ) -> None:
        """Append rows after the live ones: new row i holds prompt `source[i]` of the prefilled ones.

        `lengths` are the prompts' tokens, aligned at the right; `room` is the least (slots, columns) to have. No
        prompt may be longer than the longest live row.
        """
        extent = self.extent
        if not self.layers:
            self._own_layers = [_SlotLayer(extent, keys[:, :, :0], values[:, :, :0]) for keys, values, _ in prefilled]
            self.layers = list(self._own_layers)
        if self.num_slots < room[0] or self.num_columns < room[1]:
            self._resize(*room)
        if self.prompts is not None:
            self.prompts.admit(prefilled, lengths, source)
            lengths = [0] * len(lengths)
        if not extent.rows:
            extent.low, extent.high = 0, max(lengths)
        assert extent.high >= max(lengths), "prompts are admitted longest first"
        for layer in self._own_layers:
            layer.clear(slice(extent.rows, extent.rows + len(source)))
        if self.prompts is None:
            source_R = torch.tensor(source, device=self.start_R.device)
            for layer, other in zip(self._own_layers, prefilled.layers, strict=True):
                layer.admit(other, source_R)
        self._set_rows([*self._starts, *(extent.high - lengths[i] for i in source)])

    def keep(self, order: Sequence[int]) -> None:
        """Make row i what row `order[i]` was; rows not named leave."""
        moved = [(source, target) for target, source in enumerate(order) if source != target]
        if moved:
            sources, targets = map(list, zip(*moved, strict=True))
            for layer in self._own_layers:
                layer.move(sources, targets)
        if self.prompts is not None:
            self.prompts.keep(order)
        self._set_rows([self._starts[i] for i in order])

    def states(self) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of all slots, (S, H, C, D) each, layer by layer."""
        return [(layer.keys, layer.values) for layer in self._own_layers]

    def make_room(self) -> None:
        """Ensure that there is a column for the next token."""
        if self.extent.high == self.num_columns:
            self._shift(self.extent.low)

    def attention_mask(self) -> Tensor | None:
        """Return which columns each row may read, the next token's included: (R, T), or None when all may be read."""
        if all(start == self.extent.low for start in self._starts):
            return None
        columns_T = torch.arange(self.extent.low, self.extent.high + 1, device=self.start_R.device)
        return (columns_T >= self.start_R.unsqueeze(1)).long()

    def position_ids(self) -> Tensor:
        """Return the position of each row's next token: (R, 1)."""
        position_R = self.extent.high - self.start_R
        if self.prompts is not None:
            position_R = position_R + torch.tensor(self.prompts.row_lengths, device=position_R.device)
        return position_R.unsqueeze(1)

    def advance(self) -> None:
        """Count the token per row that a forward pass has written."""
        self.extent.high += 1

    def _set_rows(self, starts: list[int]) -> None:
        self._starts = starts
        self.extent.rows, self.extent.low = len(starts), min(starts, default=0)
        if not starts:
            self.extent.high = 0
        self.start_R = torch.tensor(starts, dtype=torch.long, device=self.start_R.device)

    def _shift(self, columns: int) -> None:
        assert columns > 0, "a row is longer than the room requested"
        for layer in self._own_layers:
            layer.shift(columns)
        self._moved_left(columns)

    def _resize(self, slots: int, columns: int) -> None:
        if self._memory is not None:
            slots, columns = self._memory.room(slots, columns)
        for number, layer in enumerate(self._own_layers):
            layer.resize(functools.partial(self._take, slots, columns, number))
        self.num_slots, self.num_columns = slots, columns
        self._moved_left(self.extent.low)

    def _take(self, slots: int, columns: int, layer: int, place: int, like_SHCD: Tensor) -> Tensor:
        if self._memory is not None:
            return self._memory.take(2 * layer + place, like_SHCD, slots, columns)
        return like_SHCD.new_zeros(slots, like_SHCD.shape[1], columns, like_SHCD.shape[3])

    def _moved_left(self, columns: int) -> None:
        self.extent.high -= columns
        self._set_rows([start - columns for start in self._starts])
