"""Cascade attention: one new token per row attends to a prompt that several rows share and to the row's own tokens.

A prompt's keys and values are stored once and read once for all its rows, as one matrix product. One softmax runs over
both parts. Knows no sampling and no token ids.
Shape suffixes: R rows, G prompts, K most rows per prompt, H key heads, N queries per key head, P prompt columns, T own
columns, C all columns, D head size, E any size, M queries of a prompt's rows together.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from coalign.models.attention import layer_windows

CASCADE = "coalign_cascade"  # its name in transformers' registry of attentions
LAYER_KINDS = {"full_attention", "sliding_attention"}
# Prompts whose rows have all left are removed once they exceed 1/FORGET_SHARE of all: moving the others costs more than
# reading a few too many.
FORGET_SHARE = 4


class SharedPrompts:
    """Keys and values of prompts, (G, H, P, D) per layer, aligned at the right, and the prompt of each row."""

    def __init__(self, config: Any) -> None:
        windows, kinds = layer_windows(config), getattr(config.get_text_config(), "layer_types", None)
        self._only = next(iter(windows.values()))
        self._windows = [windows[kind] for kind in kinds] if kinds else []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._lengths: list[int] = []
        self._of_row: list[int] = []
        self._seen: dict[int | None, Tensor | None] = {}
        self._place_R: Tensor | None = None
        self._most = 0

    @property
    def row_lengths(self) -> list[int]:
        """Return the number of tokens of each row's prompt."""
        return [self._lengths[prompt] for prompt in self._of_row]

    def admit(self, prefilled: Any, lengths: Sequence[int], source: Sequence[int]) -> None:
        """Append prompts and rows: the i-th new row continues the `source[i]`-th new prompt.

        `prefilled` is the KV cache of a forward pass over the prompts, aligned at the right; `lengths` are in tokens.
        """
        self._of_row += [len(self._lengths) + prompt for prompt in source]
        self._lengths += lengths
        new = [(layer.keys, layer.values) for layer in prefilled.layers]
        if self._keys:
            old = zip(self._keys, self._values, strict=True)
            new = [(_joined(k, keys), _joined(v, values)) for (k, v), (keys, values) in zip(old, new, strict=True)]
        self._keys, self._values = map(list, zip(*new, strict=True))
        self._place_rows()

    def keep(self, order: Sequence[int]) -> None:
        """Make row i what row `order[i]` was; rows not named leave, and prompts without rows are removed in time."""
        self._of_row = [self._of_row[row] for row in order]
        used = sorted(set(self._of_row))
        if len(self._lengths) - len(used) > len(self._lengths) // FORGET_SHARE or not used:
            self._forget_all_but(used)
        self._place_rows()

    def begin_step(self, position_R: Tensor) -> None:
        """Prepare the masks of a step whose new tokens are at these positions: (R,)."""
        width = self._keys[0].shape[2]
        windows = set(self._windows or [self._only])
        if windows == {None} and set(self._lengths) == {width}:
            self._seen = {None: None}
            return
        device = position_R.device
        position_RP = (
            torch.arange(width, device=device) - (width - torch.tensor(self.row_lengths, device=device))[:, None]
        )
        there_RP, far_RP = position_RP >= 0, position_R[:, None] - position_RP
        seen = {w: there_RP if w is None else there_RP & (far_RP < w) for w in windows}
        self._seen = {w: seen_RP[:, None, None, :] for w, seen_RP in seen.items()}

    def attend(
        self, layer: int, query_RHND: Tensor, key_RHTD: Tensor, value_RHTD: Tensor, own_R11T: Tensor | None
    ) -> Tensor:
        """Return the attention outputs (R, H, N, D) of one layer.

        Queries are scaled already. `own_R11T` is true where a row may read its own column (None: everywhere).
        """
        scores_RHNP = self._per_row(self._per_prompt(query_RHND) @ self._keys[layer].mT, query_RHND.shape[2])
        scores_RHNT = query_RHND @ key_RHTD.mT
        scores_RHNC = torch.cat([scores_RHNP, scores_RHNT], dim=-1)
        seen_R11P = self._seen[self._windows[layer] if self._windows else self._only]
        if seen_R11P is not None or own_R11T is not None:
            parts = zip((seen_R11P, own_R11T), (scores_RHNP, scores_RHNT), strict=True)
            seen = [s.new_ones(len(s), 1, 1, s.shape[-1], dtype=torch.bool) if m is None else m for m, s in parts]
            scores_RHNC = scores_RHNC.masked_fill(~torch.cat(seen, dim=-1), -torch.inf)
        weights_RHNC = scores_RHNC.softmax(dim=-1, dtype=torch.promote_types(scores_RHNC.dtype, torch.float32))
        weights_RHNC = weights_RHNC.to(query_RHND.dtype)
        width = scores_RHNP.shape[-1]
        weights_RHNP, weights_RHNT = weights_RHNC[..., :width], weights_RHNC[..., width:]
        read_RHND = self._per_row(self._per_prompt(weights_RHNP) @ self._values[layer], query_RHND.shape[2])
        return read_RHND + torch.matmul(weights_RHNT, value_RHTD)

    def _per_prompt(self, x_RHNE: Tensor) -> Tensor:
        """Return rows' vectors grouped by prompt, (G, H, K x N, E), with zeros where a prompt has fewer rows."""
        _, heads, queries, size = x_RHNE.shape
        if self._place_R is not None:
            placed = x_RHNE.new_zeros(len(self._lengths) * self._most, heads, queries, size)
            x_RHNE = placed.index_copy_(0, self._place_R, x_RHNE)
        x_GKHNE = x_RHNE.view(-1, self._most, heads, queries, size)
        return x_GKHNE.transpose(1, 2).reshape(-1, heads, self._most * queries, size)

    def _per_row(self, x_GHME: Tensor, queries: int) -> Tensor:
        """Undo `_per_prompt`: return vectors by row, (R, H, N, E)."""
        _, heads, _, size = x_GHME.shape
        x_GKHNE = x_GHME.view(-1, heads, self._most, queries, size).transpose(1, 2)
        x_RHNE = x_GKHNE.reshape(-1, heads, queries, size)
        return x_RHNE if self._place_R is None else x_RHNE.index_select(0, self._place_R)

    def _place_rows(self) -> None:
        """Assign each row a place among its prompt's rows; `_place_R` is None where rows already lie in that order."""
        self._most = max(Counter(self._of_row).values(), default=0)
        numbers: dict[int, itertools.count[int]] = {prompt: itertools.count() for prompt in self._of_row}
        places = [prompt * self._most + next(numbers[prompt]) for prompt in self._of_row]
        ordered = places == list(range(len(self._lengths) * self._most))
        device = self._keys[0].device if self._keys else None
        self._place_R = None if ordered else torch.tensor(places, device=device)

    def _forget_all_but(self, used: Sequence[int]) -> None:
        self._of_row = [used.index(prompt) for prompt in self._of_row]
        self._lengths = [self._lengths[prompt] for prompt in used]
        columns = slice(self._keys[0].shape[2] - max(self._lengths, default=0), None)
        for states in (self._keys, self._values):
            states[:] = [layer_GHPD[used, :, columns] for layer_GHPD in states] if used else []


def _joined(old_GHPD: Tensor, new_GHPD: Tensor) -> Tensor:
    """Return old and new prompts together, padded at the left to the widest."""
    width = max(old_GHPD.shape[2], new_GHPD.shape[2])
    return torch.cat([F.pad(x, (0, 0, width - x.shape[2], 0)) for x in (old_GHPD, new_GHPD)])


def attend_in_cascade(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prompts: SharedPrompts | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer: in cascade for one token per row beside shared prompts, else with SDPA.

    Queries, keys and values are (R, heads, T, D), the result (R, T, heads, D), as transformers expects. Raises
    ValueError for shared prompts under a position bias or a soft cap.
    """
    if shared_prompts is None:
        attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return attended
    if options.get("position_bias") is not None or options.get("softcap") is not None:
        raise ValueError("shared prompts are not computed under a position bias or a soft cap")
    rows, heads, _, size = query.shape
    scale = size**-0.5 if options.get("scaling") is None else options["scaling"]
    query_RHND = query.reshape(rows, key.shape[1], -1, size) * scale
    found_RHND = shared_prompts.attend(module.layer_idx, query_RHND, key, value, attention_mask)
    return found_RHND.reshape(rows, 1, heads, -1), None


@contextlib.contextmanager
def attending_in_cascade(model: Any) -> Iterator[None]:
    """Let an SDPA model attend to shared prompts as well, inside the context."""
    model.set_attn_implementation(CASCADE)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def may_cascade(model: Any) -> bool:
    """Return whether a model uses SDPA through transformers' attention interface, in layers of known kinds."""
    return (
        getattr(model.config, "_attn_implementation", None) == "sdpa"
        and set(layer_windows(model.config)) <= LAYER_KINDS
    )


AttentionInterface.register(CASCADE, attend_in_cascade)
AttentionMaskInterface.register(CASCADE, sdpa_mask)
