"""Sizes that both engines and the formulas of planning/ share: blocks of logits, rows, passes, and what is padded.

Rows, columns and widths are padded to few sizes, so that a GPU has kernels and CUDA graphs for few of them. Pure
numbers: imports no torch.
"""

from __future__ import annotations

# Logits computed at once by the fused head: on a CPU they stay in its cache; a GPU wants large products.
BLOCK_LOGITS_CPU = 2**20
BLOCK_LOGITS_GPU = 2**26
# Logits that a GPU keeps for the backward pass, which computes the others again: there memory costs less than products.
KEPT_LOGITS_GPU = 2**27
MIN_COLUMNS = 64  # the narrowest block of the vocabulary

# Padded tokens of one pass over prompts that enter a batch: enough to use the device well, few enough that the prompts
# of a pass are of like lengths.
PREFILL_TOKENS = 1024
PREFILL_TOKENS_GPU = 8192

# Scoring: tokens of a row that several prompts share, unless one alone is longer (its mask has as many entries
# squared), and padded tokens of a pass, which on a CPU stay in the cache.
ROW_TOKENS_CPU, ROW_TOKENS_GPU = 512, 1024
PASS_TOKENS_CPU = 1024

# Training: tokens of a row that items share, where train.pack_tokens leaves it open. A dense mask costs the square of a
# row. PACK_ON_CPU is also about what a token sees of a row whose unseen blocks a GPU skips.
PACK_ON_CPU, PACK_UNDER_MASK = 256, 1024

VLLM_GPU_SHARE = 0.9  # of what a vLLM worker has of its GPU; log-probs of prompts come on top of what vLLM counts

SIZES_AN_OCTAVE = 8
ROWS, COLUMNS = 8, 32  # of which the slots of sampling have multiples, fewer rows a power of two


def padded_size(size: int, least: int, an_octave: int = SIZES_AN_OCTAVE) -> int:
    """Return the next multiple of `least`, or of the power of two below over `an_octave` where that is more."""
    step = max(least, (1 << (max(size - 1, 1).bit_length() - 1)) // an_octave)
    return -(-size // step) * step


def padded_slots(rows: int, columns: int, coarser: int = 1) -> tuple[int, int]:
    """Return the rows and columns of the slots that hold as many; of fewer sizes if they are to be so much coarser."""
    least = min(ROWS, 1 << max(rows - 1, 0).bit_length())
    an_octave = SIZES_AN_OCTAVE // coarser
    return padded_size(rows, least, an_octave), padded_size(columns, COLUMNS * coarser, an_octave)
