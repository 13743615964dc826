"""The sizes that rows, columns and widths are padded to, so that a GPU has kernels and recorded steps for few of them.

Used by attention, fixed_steps and generation_memory. Pure numbers.
"""

from __future__ import annotations

SIZES_AN_OCTAVE = 8
ROWS, COLUMNS = 8, 32  # of which the slots of sampling have multiples


def padded_size(size: int, least: int) -> int:
    """Return the next multiple of `least`, or of an eighth of the power of two below where that is more."""
    step = max(least, (1 << (max(size - 1, 1).bit_length() - 1)) // SIZES_AN_OCTAVE)
    return -(-size // step) * step


def padded_slots(rows: int, columns: int) -> tuple[int, int]:
    """Return the rows and columns of the slots that hold as many."""
    return padded_size(rows, ROWS), padded_size(columns, COLUMNS)
