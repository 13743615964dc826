"""Texts that nearly repeat one another, by their word 3-grams: two at a time, or one among many by an index.

A character of an unspaced script is a word here. As it says less than a word of English, two such texts of which one
character differs nearly repeat one another too. Pure functions of texts. Knows no wordings.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from coalign.text import loose_key, num_unspaced, words

# A text of fewer distinct words has too few 3-grams, so its set of words is compared.
_SHORT_WORDS = 6


class _Shingles(NamedTuple):
    """The set of words and the set of word 3-grams of a text, and the words in order if it is of an unspaced script."""

    words: frozenset[str]
    grams: frozenset[tuple[str, str, str]]
    characters: tuple[str, ...] = ()


@functools.lru_cache(maxsize=8192)
def _shingles(text: str) -> _Shingles:
    sequence = words(text)
    return _Shingles(
        frozenset(sequence),
        frozenset(zip(sequence, sequence[1:], sequence[2:], strict=False)),
        tuple(sequence) if 2 * num_unspaced(text) > len(sequence) else (),
    )


def similarity(text: str, other: str) -> float:
    """Return the Jaccard overlap, in [0, 1], of the word 3-grams of two texts; of their words when one is short."""
    if loose_key(text) == loose_key(other):
        return 1.0
    return _overlap(_shingles(text), _shingles(other))


def _overlap(one: _Shingles, other: _Shingles) -> float:
    short = min(len(one[0]), len(other[0])) < _SHORT_WORDS
    a: frozenset[Any] = one[0] if short else one[1]
    b: frozenset[Any] = other[0] if short else other[1]
    common = len(a & b)
    union = len(a) + len(b) - common
    overlap = common / union if union else 0.0
    longest = max(len(one.characters), len(other.characters))
    if one.characters and other.characters and _one_differs(one.characters, other.characters):
        overlap = max(overlap, 1 - 0.5 / longest)  # a character is about half a word
    return overlap


def _one_differs(one: Sequence[str], other: Sequence[str]) -> bool:
    """Return whether at most one character is replaced, inserted or left out."""
    if len(one) < len(other):
        one, other = other, one
    if len(one) - len(other) > 1:
        return False
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
    rest = other[same:] if len(one) > len(other) else other[same + 1 :]
    return one[same + 1 :] == rest


def _with_one_left_out(characters: Sequence[str]) -> Iterator[Hashable]:
    """Yield keys of which two texts share one when at most one of their characters differs."""
    if characters:
        yield hash(tuple(characters))
    for place in range(len(characters)):
        yield hash((*characters[:place], *characters[place + 1 :]))


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
        self._by_characters: dict[Hashable, list[int]] = defaultdict(list)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Add a text."""
        normal = loose_key(text)
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
        for key in _with_one_left_out(shingles.characters):
            self._by_characters[key].append(number)

    def has_like(self, text: str) -> bool:
        """Return whether a text nearly repeats one of those added so far."""
        if loose_key(text) in self._normal or (self._normal and self.max_similarity <= 0):
            return True
        shingles = _shingles(text)
        if len(shingles[0]) < _SHORT_WORDS:
            found = self._candidates(shingles[0], self._by_word)
        else:
            found = self._candidates(shingles[0], self._short_by_word)
            found |= self._candidates(shingles[1], self._long_by_gram)
        for key in _with_one_left_out(shingles.characters):
            found.update(self._by_characters.get(key, ()))
        return any(_overlap(shingles, self._shingles[number]) >= self.max_similarity for number in found)

    def _candidates(self, members: Iterable[Hashable], index: Mapping[Hashable, list[int]]) -> set[int]:
        """Return the texts that may overlap enough; the small slack keeps rounding from losing one."""
        rarest = sorted((index.get(member, []) for member in members), key=len)
        needed = max(1, math.ceil(self.max_similarity * len(rarest) - 1e-6))
        return set().union(*rarest[: len(rarest) - needed + 1])
