"""The dev measurement compares answers as evaluation does: against the sums written out by hand."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from coalign.evaluation.metrics import answer_key, is_correct
from coalign.text import normalise_answer
from coalign.training.dev_measure import share_of_agreeing

TEXTS = ["yes", "Yes.", "no", " NO ", "", ".", ".5", "5", "ß", "SS", "two  words", "“yes”", None]


@pytest.mark.parametrize("seed", range(200))
def test_accuracy_and_cr_are_those_by_hand(seed: int) -> None:
    source = random.Random(seed)
    width = source.randint(2, 8)
    texts = [source.choice(TEXTS) for _ in range(width)]
    finished = [source.random() < 0.8 for _ in range(width)]
    outputs = source.sample([text for text in TEXTS if text], source.randint(1, 3))

    said = [text if done else None for text, done in zip(texts, finished, strict=True)]
    normal = [normalise_answer(text) if text else None for text in said]
    gold = {normalise_answer(output) for output in outputs}
    agreeing = [a is not None and a == b for a, b in combinations(normal, 2)]

    keys = [answer_key(text, "stop" if done else "length") for text, done in zip(texts, finished, strict=True)]
    assert keys == normal
    assert sum(is_correct(key, outputs) for key in keys) == sum(text in gold for text in normal if text)
    assert share_of_agreeing(keys) == sum(agreeing) / len(agreeing)
