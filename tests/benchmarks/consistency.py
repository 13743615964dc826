"""What eval computes of CR and MCR from answers, on its own: `python -m benchmarks.consistency INPUTS`.

Prints JSON: CPU seconds and peak memory of this process (numpy and all), and whether CR and MCR of some inputs are
what counting pairs by hand gives. Timed is all from answers as texts to intervals: normal forms, codes, CR, MCR,
corrected CR, outcome shares, and the two-level bootstrap of eval's default number of resamples.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from typing import Any

import numpy as np

from benchmarks.lengths import lengths
from benchmarks.processes import peak_mebibytes_of
from coalign.config import EvalTable
from coalign.evaluation import metrics
from coalign.evaluation.estimates import estimate_columns
from coalign.evaluation.grids import CONSISTENCY, Scored, Vocabulary, consistency_columns, consistency_sample

NUM_WORDINGS = 10
TASK_INPUTS = 1000
P_LIKELY = 0.7  # that a wording brings an input's likely answer
NUM_CHECKED = 200

Answers = list[list[str]]  # of one task: one row per input, one column per wording
Columns = dict[str, metrics.FloatArray]


def make_answers(num_inputs: int) -> list[Answers]:
    """Return answers by task, of as many kinds as real tasks have."""
    source = random.Random(0)
    tasks = []
    for start in range(0, num_inputs, TASK_INPUTS):
        kinds = [f"Answer {number}." for number in range(source.choice(lengths()["tasks"])["distinct_answers"])]
        rows = []
        for _ in range(min(TASK_INPUTS, num_inputs - start)):
            likely = source.choice(kinds)
            others = source.choices(kinds, k=NUM_WORDINGS)
            rows.append([likely if source.random() < P_LIKELY else other for other in others])
        tasks.append(rows)
    return tasks


def columns_of(answers: Answers, vocabulary: Vocabulary) -> Columns:
    """Return the consistency metrics of a task's inputs; the first answer of its first input stands for gold."""
    codes_IW = np.array([[vocabulary.code(metrics.answer_key(text, "stop")) for text in row] for row in answers])
    no_rouge = np.zeros(codes_IW.shape)
    scored = Scored(codes_IW, codes_IW == codes_IW[0, 0], no_rouge, no_rouge)
    everything_I = np.ones(len(codes_IW), bool)
    return consistency_columns(scored, everything_I, metrics.expected_agreement(codes_IW), None)


def compute(tasks: list[Answers]) -> list[Columns]:
    """Return every task's columns, after their intervals were computed."""
    vocabulary = Vocabulary()
    columns = [columns_of(answers, vocabulary) for answers in tasks]
    samples = [consistency_sample([one]) for one in columns]
    everything = {"all": list(range(len(samples)))}
    found = estimate_columns(samples, everything, ["model"], CONSISTENCY, EvalTable().num_bootstrap, seed=0)
    assert 0.0 < found["all"].models["model"]["cr"].mean < 1.0
    return columns


def counted(answers: list[str]) -> tuple[float, float]:
    """Return CR and MCR of one input as one counts them by hand."""
    pairs = list(itertools.combinations(answers, 2))
    return sum(a == b for a, b in pairs) / len(pairs), max(map(answers.count, answers)) / len(answers)


def main(num_inputs: int) -> None:
    """Compute, and print what it took."""
    tasks = make_answers(num_inputs)
    start = time.process_time()
    columns = compute(tasks)
    found: dict[str, Any] = {"seconds": time.process_time() - start, "peak_mib": peak_mebibytes_of()}
    rows = [
        (*counted(texts), cr, mcr)
        for texts, cr, mcr in zip(tasks[0][:NUM_CHECKED], columns[0]["cr"], columns[0]["mcr"], strict=False)
    ]
    found["same"] = all(abs(a - c) < 1e-9 and abs(b - d) < 1e-9 for a, b, c, d in rows)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
