"""Normal forms of texts: when two answers, two inputs or two wordings count as the same.

Data, rewards and metrics all compare texts by these, so that they agree. Knows no records.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_LEADING_POINT = re.compile(r"^\W*(?<![.\w])\.\d")
_EDGE_PUNCTUATION = " \t\n.,;:!?\"'`()[]{}<>*_"


def normalise_input(text: str) -> str:
    """Return an input's identity: Unicode NFKC, case folded, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def normalise_answer(text: str) -> str:
    """Return an answer's identity: as `normalise_input`, and without punctuation at either end.

    A text of punctuation alone keeps it, so that ":)" or "." stay answers of their own, and .5 is not 5.
    """
    folded = normalise_input(text)
    bare = folded.strip(_EDGE_PUNCTUATION)
    if bare[:1].isdigit() and _LEADING_POINT.search(folded):
        return f".{bare}"
    return bare or folded


def words(text: str) -> list[str]:
    """Return the words of a text, case folded, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def unit_hash(*parts: str) -> float:
    """Return a number in [0, 1) that depends on nothing but `parts` (SHA-256)."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
