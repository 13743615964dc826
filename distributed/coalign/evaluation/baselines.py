"""What a model that always says the same would score: the accuracy that says nothing about a model.

Used by summary.py. Knows no model and no file. Shape suffixes: I inputs, W wordings, T tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coalign.evaluation.grids import Grid
from coalign.evaluation.intervals import SHARE, estimate
from coalign.text import normalise_answer


def constant_accuracy(grid: Grid) -> float:
    """Return the accuracy of a task's best constant answer: its most frequent gold answer, known from hindsight."""
    answered_I = [bool(present_W.any()) for present_W in grid.present]
    examples = [example for example, answered in zip(grid.examples, answered_I, strict=True) if answered]
    counts = Counter(text for example in examples for text in {normalise_answer(gold) for gold in example.outputs})
    return max(counts.values()) / len(examples)


def against_constant_answers(grids: Sequence[Grid], accuracy: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the macro mean of `constant_accuracy`, and by model the paired difference to it over tasks.

    `accuracy` holds every model's task means. Intervals are t intervals over tasks.
    """
    constant_T = np.array([constant_accuracy(grid) for grid in grids])
    differences = {name: estimate(np.array(values_T) - constant_T) for name, values_T in accuracy.items()}
    return {"accuracy": estimate(constant_T, limits=SHARE), "differences": differences}
