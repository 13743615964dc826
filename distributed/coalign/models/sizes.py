"""Sizes that both engines and the formulas of planning/ share: blocks of logits, rows, passes, padding.

Rows, columns and widths are padded to few distinct sizes, so that a GPU needs few kernels and CUDA graphs. Knows
numbers only, and imports no torch.
"""

from __future__ import annotations

# Logits that the fused head computes at once: few enough for a CPU's cache, enough for a GPU's large matrix products.
BLOCK_LOGITS_CPU = 2**20
BLOCK_LOGITS_GPU = 2**26
# Logits that a GPU keeps for the backward pass, which recomputes the others: memory is cheaper there than products.
KEPT_LOGITS_GPU = 2**27
MIN_COLUMNS = 64  # the narrowest block of the vocabulary

# Prefill: padded tokens per pass. Enough to use the device well, few enough that its prompts have similar lengths.
PREFILL_TOKENS = 1024
PREFILL_TOKENS_GPU = 8192

# Scoring: tokens per row that several prompts share, unless one prompt is longer (the mask is quadratic in it), and
# padded tokens per pass, few enough for a CPU's cache.
ROW_TOKENS_CPU, ROW_TOKENS_GPU = 512, 1024
PASS_TOKENS_CPU = 1024

# Training: tokens per row that items share, where train.pack_tokens leaves it open. A dense mask is quadratic in them.
# PACK_ON_CPU is also about how much of a row a token sees where a GPU skips the unseen blocks.
PACK_ON_CPU, PACK_UNDER_MASK = 256, 1024

# Of a vLLM worker's part of its GPU; log-probs of prompts need memory beyond what vLLM counts.
VLLM_GPU_SHARE = 0.9

SIZES_PER_OCTAVE = 8  # distinct sizes from a power of two to the next
ROWS, COLUMNS = 8, 32  # KV cache slots come in multiples of these; fewer than 8 rows in powers of two


def padded_size(size: int, least: int, per_octave: int = SIZES_PER_OCTAVE) -> int:
    """Return `size` rounded up to a multiple of its step: (the power of two below it) / `per_octave`, or `least`."""
    step = max(least, (1 << (max(size - 1, 1).bit_length() - 1)) // per_octave)
    return -(-size // step) * step


def padded_slots(rows: int, columns: int, coarser: int = 1) -> tuple[int, int]:
    """Return the padded rows and columns that hold `rows` and `columns`; `coarser` divides the number of sizes."""
    least = min(ROWS, 1 << max(rows - 1, 0).bit_length())
    per_octave = SIZES_PER_OCTAVE // coarser
    return padded_size(rows, least, per_octave), padded_size(columns, COLUMNS * coarser, per_octave)
