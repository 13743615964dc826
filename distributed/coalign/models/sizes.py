"""The sizes that rows, columns and widths are padded to, so that a GPU has kernels and recorded steps for few of them.

Used by attention, fixed_steps and generation_memory. Pure numbers.
"""

from __future__ import annotations

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
