"""Texts that nearly repeat one another, by their word 3-grams: two at a time, or one among many by an index.

Pure functions of texts. Knows no wordings.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from coalign.text import normalise_input, words

# A text of fewer distinct words has too few 3-grams, so its set of words is compared.
_SHORT_WORDS = 6

_Shingles = tuple[frozenset[str], frozenset[tuple[str, str, str]]]


@functools.lru_cache(maxsize=8192)
def _shingles(text: str) -> _Shingles:
    """Return the set of words and the set of word 3-grams of a text."""
    sequence = words(text)
    return frozenset(sequence), frozenset(zip(sequence, sequence[1:], sequence[2:], strict=False))


def similarity(text: str, other: str) -> float:
    """Return the Jaccard overlap, in [0, 1], of the word 3-grams of two texts; of their words when one is short."""
    if normalise_input(text) == normalise_input(other):
        return 1.0
    return _overlap(_shingles(text), _shingles(other))


def _overlap(one: _Shingles, other: _Shingles) -> float:
    short = min(len(one[0]), len(other[0])) < _SHORT_WORDS
    a: frozenset[Any] = one[0] if short else one[1]
    b: frozenset[Any] = other[0] if short else other[1]
    common = len(a & b)
    union = len(a) + len(b) - common
    return common / union if union else 0.0


def repeats(text: str, others: Iterable[str], max_similarity: float) -> bool:
    """Return whether the similarity of a text to one of the others is at least `max_similarity`."""
    return any(similarity(text, other) >= max_similarity for other in others)


class NearRepeats:
    """Many texts, and whether another one nearly repeats any of them: the same as `repeats`, by an inverted index.

    An overlap of t with a set A needs t |A| common members, so one of any (1 - t) |A| + 1 members of A is common. Only
    texts that hold one of that many rarest members of A are compared (prefix filtering, Chaudhuri et al. 2006).
    """

    def __init__(self, max_similarity: float, texts: Iterable[str] = ()) -> None:
        self.max_similarity = max_similarity
        self._shingles: list[_Shingles] = []
        self._normal: set[str] = set()
        # Short texts are compared by words with all texts, long ones with one another by 3-grams.
        self._by_word: dict[Hashable, list[int]] = defaultdict(list)
        self._short_by_word: dict[Hashable, list[int]] = defaultdict(list)
        self._long_by_gram: dict[Hashable, list[int]] = defaultdict(list)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Add a text."""
        normal = normalise_input(text)
        if normal in self._normal:
            return
        self._normal.add(normal)
        number, shingles = len(self._shingles), _shingles(text)
        self._shingles.append(shingles)
        short = len(shingles[0]) < _SHORT_WORDS
        for word in shingles[0]:
            self._by_word[word].append(number)
            if short:
                self._short_by_word[word].append(number)
        for gram in () if short else shingles[1]:
            self._long_by_gram[gram].append(number)

    def has_like(self, text: str) -> bool:
        """Return whether a text nearly repeats one of those added so far."""
        if normalise_input(text) in self._normal or (self._normal and self.max_similarity <= 0):
            return True
        shingles = _shingles(text)
        if len(shingles[0]) < _SHORT_WORDS:
            found = self._candidates(shingles[0], self._by_word)
        else:
            found = self._candidates(shingles[0], self._short_by_word)
            found |= self._candidates(shingles[1], self._long_by_gram)
        return any(_overlap(shingles, self._shingles[number]) >= self.max_similarity for number in found)

    def _candidates(self, members: Iterable[Hashable], index: Mapping[Hashable, list[int]]) -> set[int]:
        """Return the texts that may overlap enough; the small slack keeps rounding from losing one."""
        rarest = sorted((index.get(member, []) for member in members), key=len)
        needed = max(1, math.ceil(self.max_similarity * len(rarest) - 1e-6))
        return set().union(*rarest[: len(rarest) - needed + 1])
