"""When answers agree and are right: CR, MCR, expected and corrected CR, outcome shares, accuracy, ROUGE.

Answers of one task come as a matrix of integer
codes; knows no model and no file.

Shape suffixes: I inputs, W wordings (or repeats of one wording), B weightings of the inputs, D distinct answers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coalign.text import AnswerForm, normalise_answer, tokens

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Decide = Callable[[list[tuple[str, str]]], list[bool]]  # pairs of answers in normal form -> which agree

ABSENT = -2  # no answer under this wording: its template doesn't fit the input
SILENT = -1  # an answer that agrees with nothing, not even with itself: empty, cut off, another wording's vocabulary
MAX_EXPECTED_PAIRS = 2000


def answer_key(canonical: str | None, finish: str, form: AnswerForm = ()) -> str | None:
    """Return the normal form by which a task's answers are compared; None when the answer agrees with nothing."""
    if canonical is None or finish != "stop":
        return None
    return normalise_answer(canonical, form) or None


def is_correct(key: str | None, golds: Iterable[str], form: AnswerForm = ()) -> bool:
    """Return whether an answer's normal form equals that of any gold answer."""
    return key is not None and any(key == normalise_answer(gold, form) for gold in golds)


class _Tokenizer:
    """rouge-score's own rule (lower case, runs of letters and digits), extended beyond ASCII; no stemming."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], tokenizer=_Tokenizer())


def rouge(text: str | None, references: Sequence[str], form: AnswerForm = ()) -> tuple[float, float]:
    """Return the F measures of ROUGE-1 and ROUGE-L, each the highest over the references.

    0 without a text, 1 for one that has the normal form of a reference, though it be of signs alone.
    """
    if not text or not text.strip():
        return 0.0, 0.0
    if is_correct(normalise_answer(text, form), references, form):
        return 1.0, 1.0
    scores = [_rouge_scorer().score(reference, text) for reference in references]
    return max(score["rouge1"].fmeasure for score in scores), max(score["rougeL"].fmeasure for score in scores)


def rouge_l_agrees(pairs: Sequence[tuple[str, str]], threshold: float) -> list[bool]:
    """Return for each pair of texts whether their ROUGE-L F (which is symmetric) reaches the threshold."""
    scorer = _rouge_scorer()
    return [bool(scorer.score(first, second)["rougeL"].fmeasure >= threshold) for first, second in pairs]


def pair_keys(first: IntArray, second: IntArray) -> IntArray:
    """Return one integer for each unordered pair of codes (codes below 2^31; broadcasts)."""
    keys: IntArray = (np.minimum(first, second) << np.int64(32)) | np.maximum(first, second)
    return keys


def pairs_to_compare(codes_IW: IntArray) -> IntArray:
    """Return the keys of the distinct unordered pairs of different answers that some input received."""
    width = codes_IW.shape[1]
    found = [np.empty(0, np.int64)]
    for left in range(width):
        for right in range(left + 1, width):
            first, second = codes_IW[:, left], codes_IW[:, right]
            differ = (first >= 0) & (second >= 0) & (first != second)
            found.append(np.unique(pair_keys(first[differ], second[differ])))
    return np.unique(np.concatenate(found))


def agreement_matrix(codes_IW: IntArray, agreeing: IntArray | None = None) -> BoolArray:
    """Return agree_IWW: equal codes, or a pair whose key is in `agreeing`; the diagonal: can it agree."""
    first, second = codes_IW[:, :, None], codes_IW[:, None, :]
    agree_IWW: BoolArray = (first == second) & (first >= 0)
    if agreeing is not None and agreeing.size:
        both = (first >= 0) & (second >= 0)
        agree_IWW |= np.isin(pair_keys(first, second), agreeing) & both
    return agree_IWW


def consistency_rate(agree_IWW: BoolArray, present_IW: BoolArray) -> FloatArray:
    """Return cr_I = agreeing unordered pairs / C(n, 2), n the wordings present; NaN where n < 2."""
    n_I = present_IW.sum(axis=1)
    diagonal_I = np.einsum("iww->i", agree_IWW, dtype=np.int64)
    agreeing_I = (agree_IWW.sum(axis=(1, 2)) - diagonal_I) / 2
    pairs_I = n_I * (n_I - 1) / 2
    result: FloatArray = np.divide(agreeing_I, pairs_I, out=np.full(len(n_I), np.nan), where=pairs_I > 0)
    return result


def largest_cluster_share(agree_IWW: BoolArray, present_IW: BoolArray) -> FloatArray:
    """Return mcr_I = largest agreeing cluster / n; NaN where n = 0.

    In wording order each answer joins the first cluster whose first member it agrees with, or opens one of its own.
    """
    taken_IW = ~np.einsum("iww->iw", agree_IWW)
    largest_I = np.zeros(len(agree_IWW), np.int64)
    for leader in range(agree_IWW.shape[1]):
        members_IW = agree_IWW[:, leader, :] & ~taken_IW & ~taken_IW[:, leader, None]
        taken_IW |= members_IW
        np.maximum(largest_I, members_IW.sum(axis=1), out=largest_I)
    n_I = present_IW.sum(axis=1)
    result: FloatArray = np.divide(largest_I, n_I, out=np.full(len(n_I), np.nan), where=n_I > 0)
    return result


def answer_shares(codes_IW: IntArray) -> tuple[IntArray, FloatArray]:
    """Return the distinct answers codes_D of a task and p_D, their shares among all its answers (silent ones too)."""
    answers = codes_IW[codes_IW != ABSENT]
    codes_D, counts_D = np.unique(answers[answers >= 0], return_counts=True)
    return codes_D, counts_D / max(len(answers), 1)


@dataclasses.dataclass(frozen=True, slots=True)
class ExpectedAgreement:
    """The pieces of e = sum_a p_a^2 + sum over pairs a != b that agree of 2 p_a p_b (the second sum is 0 for `exact`).

    `keys` are the pairs whose agreement must be known and `weights` what each adds to e.
    """

    same: float
    keys: IntArray
    weights: FloatArray

    def value(self, agreeing: IntArray | None = None) -> float:
        """Return e, given the keys of the pairs that agree."""
        if agreeing is None or not self.keys.size:
            return self.same
        return self.same + float(self.weights[np.isin(self.keys, agreeing)].sum())


def expected_agreement(codes_IW: IntArray, seed: int = 0, max_pairs: int = MAX_EXPECTED_PAIRS) -> ExpectedAgreement:
    """Describe the CR expected if every answer were drawn independently from the task's own answer frequencies.

    All pairs of distinct answers count when there are at most `max_pairs`; else as many seeded draws estimate them.
    """
    codes_D, p_D = answer_shares(codes_IW)
    same = float(np.square(p_D).sum())
    num_distinct = len(codes_D)
    if num_distinct < 2:
        return ExpectedAgreement(same, np.empty(0, np.int64), np.empty(0))
    if num_distinct * (num_distinct - 1) // 2 <= max_pairs:
        first, second = np.triu_indices(num_distinct, k=1)
        return ExpectedAgreement(same, pair_keys(codes_D[first], codes_D[second]), 2 * p_D[first] * p_D[second])
    answers = codes_IW[codes_IW != ABSENT]
    first, second = np.random.default_rng(seed).choice(answers, size=(2, max_pairs))
    differ = (first >= 0) & (second >= 0) & (first != second)
    keys, counts = np.unique(pair_keys(first[differ], second[differ]), return_counts=True)
    return ExpectedAgreement(same, keys, counts / max_pairs)


def corrected_rate(cr_I: FloatArray, expected: float) -> FloatArray:
    """Return (CR - e) / (1 - e); 0 where e = 1, since a constant answer has CR 1 and is worth nothing."""
    if expected >= 1.0 - 1e-12:
        return np.where(np.isnan(cr_I), np.nan, 0.0)
    corrected: FloatArray = (cr_I - expected) / (1.0 - expected)
    return corrected


def outcome_shares(cr_I: FloatArray, correct_IW: BoolArray, present_IW: BoolArray) -> dict[str, FloatArray]:
    """Sort each input into exactly one of four outcomes, given as 0/1 columns that sum to 1 (NaN where CR is NaN).

    always_right: every answer is correct. always_wrong_alike: none is, and all agree (CR = 1). inconsistent: not always
    right, and some pair disagrees (CR < 1). mixed: the rest (all agree, some correct and some not, which only an
    agreement wider than `exact` allows).
    """
    right_I = (correct_IW | ~present_IW).all(axis=1)
    wrong_I = ~(correct_IW & present_IW).any(axis=1)
    alike_I = cr_I >= 1.0 - 1e-12
    known_I = ~np.isnan(cr_I)
    columns = {
        "always_right": right_I,
        "always_wrong_alike": wrong_I & alike_I & ~right_I,
        "inconsistent": ~right_I & ~alike_I,
        "mixed": ~right_I & alike_I & ~wrong_I,
    }
    return {name: np.where(known_I, column.astype(float), np.nan) for name, column in columns.items()}


def mean_over_wordings(values_IW: NDArray[Any], present_IW: BoolArray) -> FloatArray:
    """Return each input's mean over the wordings present; NaN where there is none."""
    n_I = present_IW.sum(axis=1)
    total_I = np.where(present_IW, values_IW, 0.0).sum(axis=1)
    result: FloatArray = np.divide(total_I, n_I, out=np.full(len(n_I), np.nan), where=n_I > 0)
    return result


def wording_accuracy(correct_IW: BoolArray, present_IW: BoolArray, weights_BI: FloatArray) -> FloatArray:
    """Return accuracy_BW of every wording over the inputs it fits, under each weighting; NaN where it fits none."""
    right_BW = weights_BI @ (correct_IW & present_IW).astype(float)
    weight_BW = weights_BI @ present_IW.astype(float)
    result: FloatArray = np.divide(right_BW, weight_BW, out=np.full(right_BW.shape, np.nan), where=weight_BW > 0)
    return result


def worst_and_spread(accuracy_BW: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the lowest wording accuracy and highest - lowest, of each row (NaN wordings passed over)."""
    lowest_B = np.where(np.isnan(accuracy_BW), np.inf, accuracy_BW).min(axis=1)
    highest_B = np.where(np.isnan(accuracy_BW), -np.inf, accuracy_BW).max(axis=1)
    return lowest_B, highest_B - lowest_B
