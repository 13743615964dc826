"""Which tokens of a row see one another: one rule, as a dense mask (SDPA, eager) or a block mask (FlexAttention).

Knows a model's config and its attention implementation, no texts and no losses. Shape suffixes: B rows, H heads,
T tokens (queries or keys), Q and K blocks of queries and of keys, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCKS = "coalign_blocks"  # the name of our attention in transformers' registry
BLOCK = 128  # tokens per block, FlexAttention's default
MAX_KERNELS = 64  # compiled kernels: two per width, with and without gradient; torch's default limit is 8

# The largest difference, in nats, between log-probs of two layouts that counts as rounding; 0.5 in narrower dtypes.
LOGP_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}

MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Mask = Tensor | BlockMask | dict[str, Tensor | BlockMask]


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Which item and segment each token belongs to, in rows that hold several items and several continuations per item.

    Each array is (B, T). `segments_BT` is -1 on padding, 0 on a prompt and k on its k-th continuation. `items_BT`
    numbers the items of a row. `positions_BT` restart after the prompt for every continuation.
    """

    segments_BT: Tensor
    items_BT: Tensor
    positions_BT: Tensor

    def to(self, device: torch.device) -> RowLayout:
        """Return the layout on a device."""
        return RowLayout(self.segments_BT.to(device), self.items_BT.to(device), self.positions_BT.to(device))

    def rule(self, window: int | None) -> MaskRule:
        """Return a function of row, head, query and key indices, which broadcast, to whether the query sees the key.

        A token sees earlier tokens of its item's prompt and of its own segment, less than `window` positions back, and
        itself. Padding sees only itself, so that every softmax has an entry. The form is FlexAttention's mask_mod.
        """
        segments_BT, items_BT, positions_BT = self.segments_BT, self.items_BT, self.positions_BT

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            of_query, of_key = segments_BT[row, query], segments_BT[row, key]
            seen = (key <= query) & (items_BT[row, query] == items_BT[row, key])
            seen = seen & (of_key >= 0) & ((of_key == 0) | (of_key == of_query))
            if window is not None:
                seen = seen & (positions_BT[row, query] - positions_BT[row, key] < window)
            return seen | (query == key)

        return sees


def dense_mask(layout: RowLayout, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return the additive mask of a layout (B, 1, T, T): 0 where a token sees another, else the lowest number."""
    rows, width = layout.segments_BT.shape
    device = layout.segments_BT.device
    row_B111 = torch.arange(rows, device=device).view(-1, 1, 1, 1)
    place_T = torch.arange(width, device=device)
    seen_B1TT = layout.rule(window)(row_B111, row_B111, place_T.view(1, 1, -1, 1), place_T.view(1, 1, 1, -1))
    return torch.zeros(seen_B1TT.shape, dtype=dtype, device=device).masked_fill_(~seen_B1TT, torch.finfo(dtype).min)


def block_mask(layout: RowLayout, window: int | None) -> BlockMask:
    """Return the mask of a layout as blocks; FlexAttention computes only those that are not empty.

    A token sees two runs of tokens, one in its item's prompt and one in its own segment. So blocks follow from where
    runs begin and end, while torch's create_block_mask would evaluate the rule for every pair of tokens.
    """
    width = layout.segments_BT.shape[1]
    missing = (0, -width % BLOCK)
    padded = RowLayout(
        F.pad(layout.segments_BT, missing, value=-1),
        F.pad(layout.items_BT, missing, value=-1),
        F.pad(layout.positions_BT, missing),
    )
    seen_BQK, full_BQK = _seen_blocks(padded, window), _full_blocks(padded, window)
    mask = BlockMask.from_kv_blocks(
        *_in_order(seen_BQK & ~full_BQK),
        *_in_order(full_BQK),
        BLOCK_SIZE=BLOCK,
        mask_mod=layout.rule(window),
        seq_lengths=(width, width),
    )
    mask.ndim = 4  # type: ignore[attr-defined]  # GPT-2 reads it as if the mask were a tensor
    return mask


def _seen_blocks(layout: RowLayout, window: int | None) -> Tensor:
    """Return whether any token of block Q sees any token of block K: (B, Q, K)."""
    segments_BT, items_BT, positions_BT = layout.segments_BT, layout.items_BT, layout.positions_BT
    rows, width = segments_BT.shape
    index_BT = torch.arange(width, device=segments_BT.device).expand(rows, -1)
    item_BT = _run_starts(items_BT, index_BT)
    segment_BT = torch.maximum(item_BT, _run_starts(segments_BT, index_BT))
    far_BT = torch.zeros_like(index_BT) if window is None else (positions_BT - window + 1).clamp(min=0)
    # In the prompt: from the first position within the window. A segment begins at the position equal to its length.
    first_BT, last_BT = item_BT + far_BT, item_BT + positions_BT.gather(1, segment_BT) - 1
    own_BT = segment_BT if window is None else torch.maximum(segment_BT, index_BT - window + 1)
    own_BT = torch.where(segments_BT < 0, index_BT, own_BT)
    in_prompt_BT = (segments_BT > 0) & (first_BT <= last_BT)

    blocks = width // BLOCK
    change_BQK = torch.zeros(rows, blocks, blocks + 1, dtype=torch.int32, device=segments_BT.device)
    base_BT = (torch.arange(rows, device=segments_BT.device).unsqueeze(1) * blocks + index_BT // BLOCK) * (blocks + 1)
    for start_BT, end_BT, there_BT in ((first_BT, last_BT, in_prompt_BT), (own_BT, index_BT, segments_BT > -2)):
        flat, one = change_BQK.view(-1), there_BT.to(torch.int32).view(-1)
        flat.scatter_add_(0, (base_BT + start_BT.clamp(max=width - 1) // BLOCK).view(-1), one)
        flat.scatter_add_(0, (base_BT + end_BT.clamp(min=0) // BLOCK + 1).view(-1), -one)
    return change_BQK.cumsum(dim=-1)[..., :-1] > 0


def _run_starts(values_BT: Tensor, index_BT: Tensor) -> Tensor:
    """Return the index at which each token's run of equal values begins: (B, T)."""
    begins_BT = F.pad(values_BT[:, 1:] != values_BT[:, :-1], (1, 0), value=True)
    return torch.where(begins_BT, index_BT, 0).cummax(dim=1).values


def _full_blocks(layout: RowLayout, window: int | None) -> Tensor:
    """Return where block K lies wholly in a prompt and block Q wholly after it, so no mask is needed: (B, Q, K)."""
    segments_BKT, items_BKT = (x.view(len(x), -1, BLOCK) for x in (layout.segments_BT, layout.items_BT))
    lowest_BK, highest_BK = items_BKT.amin(dim=-1), items_BKT.amax(dim=-1)
    pure_BK = (lowest_BK == highest_BK) & (lowest_BK >= 0)
    prompt_BK = pure_BK & (segments_BKT.amax(dim=-1) == 0)
    same_BQK = (lowest_BK.unsqueeze(2) == lowest_BK.unsqueeze(1)) & pure_BK.unsqueeze(2) & prompt_BK.unsqueeze(1)
    return same_BQK.tril(diagonal=-1 if window is None else -same_BQK.shape[1])


def _in_order(dense_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """Return each query block's number of key blocks, (B, 1, Q), and all block indices, those first: (B, 1, Q, K)."""
    count_BQ = dense_BQK.sum(dim=-1, dtype=torch.int32)
    order_BQK = dense_BQK.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count_BQ.unsqueeze(1), order_BQK.unsqueeze(1)


def layer_windows(config: Any) -> dict[str, int | None]:
    """Return {kind of layer: its sliding window in positions, the query's own included (None: unlimited)}."""
    text_config = config.get_text_config()
    window: int | None = getattr(text_config, "sliding_window", None) or None
    kinds = set(getattr(text_config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def mask_for(model: Any, mask: Tensor | RowLayout) -> Mask:
    """Return what a model takes as `attention_mask`: (B, T) unchanged, a layout as the mask that its attention reads.

    A model whose layers differ in their windows takes a dict of masks, one per kind of layer.
    """
    if isinstance(mask, Tensor):
        return mask
    inner = bare(model)
    dtype = next(inner.parameters()).dtype

    def make(window: int | None) -> Tensor | BlockMask:
        return block_mask(mask, window) if uses_blocks(model) else dense_mask(mask, window, dtype)

    windows = layer_windows(inner.config)
    masks = {kind: make(window) for kind, window in windows.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def complaint_of(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    """Return a message when log-probs of two layouts differ by more than rounding in a model's dtype, else ""."""
    difference = float((found - expected).abs().max())
    if difference <= LOGP_TOLERANCE.get(dtype, 0.5):
        return ""
    return f"log-probs differ by {difference:.2g} from those of the plain computation"


def bare(model: Any) -> Any:
    """Return the network inside an engine's wrapper; a bare network is returned as it is."""
    return getattr(model, "module", model)


def uses_blocks(model: Any) -> bool:
    """Return whether a model's attention takes block masks."""
    return getattr(bare(model).config, "_attn_implementation", None) == BLOCKS


def use_blocks(model: Any) -> bool:
    """Switch a model from SDPA to block masks for shared rows; return whether its attention now takes them.

    Models with another attention stay unchanged.
    """
    network = bare(model)
    if network.config._attn_implementation == "sdpa":
        network.set_attn_implementation(BLOCKS)
    return uses_blocks(model)


def use_dense(model: Any) -> None:
    """Switch a model back to SDPA with dense masks."""
    bare(model).set_attn_implementation("sdpa")


def attend_by_blocks(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Compute the attention of one layer: with FlexAttention under a block mask, else with SDPA.

    Queries, keys and values are (B, H, T, D), the result (B, T, H, D), as transformers expects. Raises ValueError for
    a model with a soft cap on its scores.
    """
    if not isinstance(attention_mask, BlockMask):
        attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return attended
    if options.get("softcap") is not None:
        raise ValueError("attention under a block mask has no soft cap")
    queries_per_key = query.shape[1] // key.shape[1]
    if queries_per_key & (queries_per_key - 1):  # the kernel needs a power of two
        key, value = (x.repeat_interleave(queries_per_key, dim=1) for x in (key, value))
    attend = _compiled() if query.is_cuda else flex_attention
    found_BHTD = attend(
        query,
        key,
        value,
        block_mask=attention_mask,
        scale=options.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found_BHTD.transpose(1, 2).contiguous(), None


@functools.cache
def _compiled() -> Any:
    """Return FlexAttention compiled, one kernel per shape; uncompiled it would materialise all scores."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_KERNELS)
    return torch.compile(flex_attention, dynamic=False)


AttentionInterface.register(BLOCKS, attend_by_blocks)
AttentionMaskInterface.register(BLOCKS, sdpa_mask)
