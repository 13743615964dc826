"""Metrics and intervals against slow, obvious twins and against cases worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from coalign.errors import UserError
from coalign.evaluation import agreement, intervals, metrics, typed_json
from coalign.evaluation.metrics import ABSENT, SILENT

A, B, C = 0, 1, 2


def random_codes(seed: int, inputs: int = 60, width: int = 7, answers: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(ABSENT, answers, size=(inputs, width))


def slow_agree(a: int, b: int, agreeing: set[tuple[int, int]]) -> bool:
    return a >= 0 and b >= 0 and (a == b or (min(a, b), max(a, b)) in agreeing)


def slow_cr(row: list[int], agreeing: set[tuple[int, int]]) -> float:
    there = [code for code in row if code != ABSENT]
    pairs = list(itertools.combinations(there, 2))
    return sum(slow_agree(a, b, agreeing) for a, b in pairs) / len(pairs) if pairs else math.nan


def slow_mcr(row: list[int], agreeing: set[tuple[int, int]]) -> float:
    there = [code for code in row if code != ABSENT]
    clusters: list[list[int]] = []
    for code in there:
        if code == SILENT:
            continue
        for cluster in clusters:
            if slow_agree(cluster[0], code, agreeing):
                cluster.append(code)
                break
        else:
            clusters.append([code])
    return max(map(len, clusters), default=0) / len(there) if there else math.nan


def rates(codes: list[int], agreeing: set[tuple[int, int]] = frozenset()) -> tuple[float, float]:  # type: ignore[assignment]
    codes_IW = np.array([codes])
    keys = np.array([metrics.pair_keys(np.int64(a), np.int64(b)) for a, b in agreeing], np.int64)
    agree = metrics.agreement_matrix(codes_IW, keys)
    present = codes_IW != ABSENT
    return float(metrics.consistency_rate(agree, present)[0]), float(metrics.largest_cluster_share(agree, present)[0])


@pytest.mark.parametrize(
    ("codes", "cr", "mcr"),
    [
        ([A, A, A, A], 1.0, 1.0),
        ([A, A, A, B], 3 / 6, 3 / 4),
        ([A, A, B, B], 2 / 6, 2 / 4),
        ([A, B, C, 3], 0.0, 1 / 4),
        ([SILENT, SILENT, SILENT, SILENT], 0.0, 0.0),
        ([A, A, SILENT, SILENT], 1 / 6, 2 / 4),
        ([A, ABSENT, A, A, B], 3 / 6, 3 / 4),
        ([A, ABSENT, ABSENT], math.nan, 1.0),
    ],
)
def test_rates_by_hand(codes: list[int], cr: float, mcr: float) -> None:
    assert rates(codes) == pytest.approx((cr, mcr), nan_ok=True)


def test_clusters_form_around_their_first_member() -> None:
    chain = {(A, B), (B, C)}
    assert rates([A, B, C], chain) == pytest.approx((2 / 3, 2 / 3))  # {A, B} and {C}
    assert rates([B, A, C], chain) == pytest.approx((2 / 3, 1.0))  # both agree with B, which came first


@pytest.mark.parametrize("seed", range(5))
def test_rates_equal_the_slow_twin(seed: int) -> None:
    codes_IW = random_codes(seed)
    agreeing = {(0, 2), (1, 3)}
    keys = np.array([metrics.pair_keys(np.int64(a), np.int64(b)) for a, b in agreeing])
    for chosen, chosen_keys in ((set(), None), (agreeing, keys)):
        agree = metrics.agreement_matrix(codes_IW, chosen_keys)
        present = codes_IW != ABSENT
        rows = codes_IW.tolist()
        np.testing.assert_allclose(metrics.consistency_rate(agree, present), [slow_cr(r, chosen) for r in rows])
        np.testing.assert_allclose(metrics.largest_cluster_share(agree, present), [slow_mcr(r, chosen) for r in rows])


def test_pairs_to_compare_are_the_distinct_unordered_ones() -> None:
    codes_IW = random_codes(3)
    wanted = {
        (min(a, b), max(a, b))
        for row in codes_IW.tolist()
        for a, b in itertools.combinations(row, 2)
        if a >= 0 and b >= 0 and a != b
    }
    assert {(int(k) >> 32, int(k) & 0xFFFFFFFF) for k in metrics.pairs_to_compare(codes_IW)} == wanted


def test_expected_agreement_by_hand() -> None:
    codes_IW = np.array([[A, A, B, SILENT], [A, B, C, ABSENT]])
    expected = metrics.expected_agreement(codes_IW)  # of 7 answers: A 3, B 2, C 1, silent 1
    assert expected.value() == pytest.approx((9 + 4 + 1) / 49)
    agreeing = np.array([metrics.pair_keys(np.int64(A), np.int64(B))])
    assert expected.value(agreeing) == pytest.approx((9 + 4 + 1 + 2 * 3 * 2) / 49)


def test_expected_agreement_is_what_independent_answers_reach() -> None:
    rng = np.random.default_rng(0)
    codes_IW = rng.choice(4, size=(20_000, 5), p=[0.5, 0.3, 0.1, 0.1])
    expected = metrics.expected_agreement(codes_IW).value()
    assert expected == pytest.approx(0.25 + 0.09 + 0.01 + 0.01, abs=0.005)
    cr_I = metrics.consistency_rate(metrics.agreement_matrix(codes_IW), codes_IW >= 0)
    assert float(cr_I.mean()) == pytest.approx(expected, abs=0.005)
    assert float(metrics.corrected_rate(cr_I, expected).mean()) == pytest.approx(0.0, abs=0.01)


def test_many_pairs_are_estimated_from_draws() -> None:
    codes_IW = np.random.default_rng(1).integers(0, 40, size=(500, 6))
    every = np.array([metrics.pair_keys(np.int64(a), np.int64(b)) for a, b in itertools.combinations(range(40), 2)])
    sampled = metrics.expected_agreement(codes_IW, seed=1, max_pairs=500)
    assert sampled.value(every) == pytest.approx(1.0, abs=0.05)
    assert sampled.value() == metrics.expected_agreement(codes_IW).value()


def test_corrected_rate() -> None:
    np.testing.assert_allclose(metrics.corrected_rate(np.array([1.0, 0.5, 0.2]), 0.5), [1.0, 0.0, -0.6])
    constant = np.zeros((3, 4), np.int64)
    e = metrics.expected_agreement(constant).value()
    assert e == 1.0
    np.testing.assert_array_equal(metrics.corrected_rate(np.ones(3), e), 0.0)


@pytest.mark.parametrize(
    ("cr", "correct", "outcome"),
    [
        (1.0, [1, 1, 1, 1], "always_right"),
        (0.3, [1, 1, 1, 1], "always_right"),  # several golds
        (1.0, [0, 0, 0, 0], "always_wrong_alike"),
        (0.5, [0, 0, 0, 0], "inconsistent"),
        (0.5, [1, 1, 1, 0], "inconsistent"),
        (1.0, [1, 1, 1, 0], "mixed"),  # a wide agreement
    ],
)
def test_every_input_has_one_outcome(cr: float, correct: list[int], outcome: str) -> None:
    present = np.ones((1, 5), bool)
    present[0, 4] = False
    correct_IW = np.array([[*correct, 0]], bool)
    shares = metrics.outcome_shares(np.array([cr]), correct_IW, present)
    assert {name for name, column in shares.items() if column[0] == 1.0} == {outcome}
    assert sum(float(column[0]) for column in shares.values()) == 1.0


def test_wordings() -> None:
    correct = np.array([[1, 0, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], bool)
    present = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]], bool)
    np.testing.assert_allclose(metrics.mean_over_wordings(correct, present), [2 / 3, 1 / 3, 1.0, 0.0])
    accuracy_BW = metrics.wording_accuracy(correct, present, np.array([[0.25] * 4, [0, 0, 0.5, 0.5]]))
    np.testing.assert_allclose(accuracy_BW, [[0.75, 0.25, 0.5], [0.5, 0.5, np.nan]])
    worst_B, spread_B = metrics.worst_and_spread(accuracy_BW)
    np.testing.assert_allclose(worst_B, [0.25, 0.5])
    np.testing.assert_allclose(spread_B, [0.5, 0.0])


@pytest.mark.parametrize(
    ("canonical", "finish", "key"),
    [
        ("Yes.", "stop", "yes"),
        ("  ", "stop", None),
        ("Yes", "length", None),
        (None, "stop", None),
        (":)", "stop", ":)"),
    ],
)
def test_answer_key(canonical: str | None, finish: str, key: str | None) -> None:
    assert metrics.answer_key(canonical, finish) == key
    assert metrics.is_correct(key, ["No", "YES!", ":)"]) == (key is not None)


def slow_rouge(text: str, reference: str) -> tuple[float, float]:
    a, b = text.lower().split(), reference.lower().split()
    overlap = sum((Counter(a) & Counter(b)).values())
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in itertools.product(range(len(a)), range(len(b))):
        lengths[i + 1][j + 1] = lengths[i][j] + 1 if a[i] == b[j] else max(lengths[i][j + 1], lengths[i + 1][j])
    return tuple(2 * n / (len(a) + len(b)) for n in (overlap, lengths[-1][-1]))  # type: ignore[return-value]


def test_rouge() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        text, first, second = (" ".join(rng.choice(list("abcde"), size=rng.integers(1, 8))) for _ in range(3))
        slow = [slow_rouge(text, reference) for reference in (first, second)]
        assert metrics.rouge(text, [first, second]) == pytest.approx(tuple(map(max, zip(*slow, strict=True))))
    assert metrics.rouge(None, ["a"]) == metrics.rouge("", ["a"]) == (0.0, 0.0)
    assert metrics.rouge("Größe, naïve", ["größe naïve!"]) == (1.0, 1.0)
    assert metrics.rouge_l_agrees([("the red cat", "the cat"), ("a", "b")], 0.8) == [True, False]


def test_parse_agreement() -> None:
    assert agreement.parse_agreement("exact").kind == "exact"
    assert agreement.parse_agreement("rouge_l>=0.7") == agreement.Agreement("rouge_l", threshold=0.7)
    assert agreement.parse_agreement("models/judge") == agreement.Agreement("judge", folder="models/judge")
    for bad in ("rouge_l>=70", "rouge_l>=x", "rouge_l>0.7", "rouge_l", "rouge_l>=0", "rouge_l>=nan"):
        with pytest.raises(UserError, match=r"use rouge_l>=0\.7"):
            agreement.parse_agreement(bad)


# Student's t, 97.5 %: printed in every statistics book.
@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (5, 2.57058), (6, 2.44691), (9, 2.26216), (18, 2.10092), (30, 2.04227)],
)
def test_t_quantile(degrees: int, quantile: float) -> None:
    assert intervals.t_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-4)


def test_intervals_by_number_of_tasks() -> None:
    points = np.arange(10.0)
    drawn = np.linspace(0.0, 1.0, 1001)
    assert intervals.estimate(points[:0]).mean is None
    few = intervals.estimate(points[:5], drawn)
    assert (few.mean, few.low, few.high, few.method) == (2.0, None, None, "none")
    some = intervals.estimate(points, drawn)  # sd 3.02765, 9 degrees of freedom
    half = 2.26216 * 3.02765 / math.sqrt(10)
    assert (some.low, some.high) == (pytest.approx(4.5 - half, abs=1e-3), pytest.approx(4.5 + half, abs=1e-3))
    many = intervals.estimate(np.arange(20.0), drawn)
    assert (many.low, many.high, many.method) == (pytest.approx(0.025), pytest.approx(0.975), "bootstrap")
    json.dumps(typed_json.to_json([few, some, many]), allow_nan=False)
    cut = intervals.estimate(np.arange(20.0), drawn, (0.5, 0.7))
    assert (cut.mean, cut.low, cut.high) == (9.5, 0.5, 0.7)


def linear(values_IM: np.ndarray) -> intervals.TaskSample:
    return intervals.TaskSample(len(values_IM), lambda weights_BI: weights_BI @ values_IM)


def slow_bootstrap(tasks: list[np.ndarray], num: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(num):
        drawn = [tasks[i] for i in rng.integers(0, len(tasks), size=len(tasks))]
        means.append(np.mean([task[rng.integers(0, len(task), size=len(task))].mean(axis=0) for task in drawn], axis=0))
    return np.array(means)


def test_bootstrap_equals_the_slow_twin_in_distribution() -> None:
    rng = np.random.default_rng(0)
    tasks = [rng.normal(rng.normal(), 2.0, size=(rng.integers(3, 15), 2)) for _ in range(25)]
    (fast,) = intervals.two_level_bootstrap([linear(t) for t in tasks], [range(25)], 6000, seed=1)
    slow = slow_bootstrap(tasks, 6000, seed=2)
    np.testing.assert_allclose(fast.mean(axis=0), slow.mean(axis=0), atol=0.03)
    np.testing.assert_allclose(fast.std(axis=0), slow.std(axis=0), rtol=0.05)
    np.testing.assert_allclose(np.quantile(fast, 0.025, axis=0), np.quantile(slow, 0.025, axis=0), atol=0.06)
    np.testing.assert_allclose(np.corrcoef(fast.T)[0, 1], np.corrcoef(slow.T)[0, 1], atol=0.05)


def test_bootstrap_draws_are_shared_by_columns_and_repeat() -> None:
    rng = np.random.default_rng(0)
    tasks = [linear(np.repeat(rng.normal(size=(9, 1)), 2, axis=1) + np.array([0.0, 0.25])) for _ in range(6)]
    once, part = intervals.two_level_bootstrap(tasks, [range(6), [0, 2]], 200, seed=3)
    np.testing.assert_allclose(once[:, 1] - once[:, 0], 0.25)
    np.testing.assert_allclose(part[:, 1] - part[:, 0], 0.25)
    np.testing.assert_array_equal(once, intervals.two_level_bootstrap(tasks, [range(6), [0, 2]], 200, seed=3)[0])


def test_hundred_thousand_inputs_in_ten_seconds_and_a_gigabyte() -> None:
    rng = np.random.default_rng(0)
    tracemalloc.start()
    started = time.process_time()
    tasks = []
    for _ in range(100):
        codes_IW = rng.integers(SILENT, 5, size=(1000, 10))
        agree = metrics.agreement_matrix(codes_IW)
        present = codes_IW != ABSENT
        cr_I = metrics.consistency_rate(agree, present)
        mcr_I = metrics.largest_cluster_share(agree, present)
        tasks.append(linear(np.stack([cr_I, mcr_I], axis=1)))
    (means,) = intervals.two_level_bootstrap(tasks, [range(100)], 2000, seed=0)
    seconds = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert means.shape == (2000, 2)
    assert seconds < 10.0
    assert peak < 1e9


@pytest.mark.parametrize(
    ("text", "reference", "rouge_1", "rouge_l"),
    [
        ("+", "+", 1.0, 1.0),
        ("`+`", "+", 1.0, 1.0),
        ("+", "-", 0.0, 0.0),
        (" ", " ", 0.0, 0.0),
        ("天气很好", "天气不好", 0.75, 0.75),
        ("好很气天", "天气很好", 1.0, 0.25),
        ("मौसम अच्छा है", "मौसम खराब है", 2 / 3, 2 / 3),
        ("ไปโรงเรียน", "ไปโรงแรม", 10 / 17, 10 / 17),
        ("날씨가 좋다", "날씨가 나쁘다", 0.5, 0.5),
        ("the cat sat", "the cat ran", 2 / 3, 2 / 3),
        ("👍", "👍", 1.0, 1.0),
        ("👍", "👎", 0.0, 0.0),
    ],
)
def test_rouge_of_many_scripts_by_hand(text: str, reference: str, rouge_1: float, rouge_l: float) -> None:
    assert metrics.rouge(text, [reference]) == pytest.approx((rouge_1, rouge_l))


def test_what_counts_in_a_task_decides_codes_and_correctness() -> None:
    assert metrics.answer_key("mW.", "stop") == metrics.answer_key("MW", "stop")
    key = metrics.answer_key("mW.", "stop", ("case",))
    assert key == "mW" and metrics.is_correct(key, ["mW"], ("case",)) and not metrics.is_correct(key, ["MW"], ("case",))
