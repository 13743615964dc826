"""From responses to a summary: what is counted, compared and dropped."""

from __future__ import annotations

import pytest

from coalign.evaluation import requests as evaluation
from coalign.evaluation import summary
from coalign.evaluation.estimates import COMPARED
from coalign.evaluation.metrics_schema import AnswerCounts, ModesAgree, NoiseFloor
from coalign.evaluation.requests import ModelOutput
from coalign.records import Example, Response, Task, Wording
from coalign.wordings.asking import Pair
from unit.worlds import by_rule, example, half_right, response, results, table, wordings, world


def test_numbers_by_hand() -> None:
    content = results()
    base, align = content.models["base"], content.models["align"]
    assert base.all.cr.mean == pytest.approx(2 / 6)
    assert base.all.mcr.mean == pytest.approx(1 / 2)
    assert base.all.accuracy.mean == pytest.approx(1 / 2)
    assert base.all.worst_wording.mean == 0.0
    assert base.all.spread.mean == 1.0
    assert base.all.expected_cr.mean == pytest.approx(1 / 2)
    assert base.all.corrected_cr.mean == pytest.approx((1 / 3 - 1 / 2) / (1 / 2))
    assert base.all.inconsistent.mean == 1.0
    assert align.all.cr.mean == align.all.accuracy.mean == align.all.always_right.mean == 1.0
    assert align.all.corrected_cr.mean == 0.0  # one answer to everything
    assert align.seen.cr.num_tasks == align.unseen.cr.num_tasks == 4
    assert align.all.cr.num_tasks == 8
    assert base.noise.neighbours == NoiseFloor(cr=1.0, mcr=1.0, num_inputs=1, num_repeats=3, num_tasks=1)
    assert base.modes_agree == ModesAgree(share=1.0, num_answers=4)
    rows = {(row.a, row.b, row.metric): row.estimate for row in content.differences}
    assert rows["base", "align", "cr"].mean == pytest.approx(4 / 6)
    assert rows["base", "align", "cr"].method == "t"
    assert {metric for _, _, metric in rows} == set(COMPARED)
    assert content.differences_seen[0].estimate.low is None


def test_a_constant_answer_is_the_most_frequent_gold_of_each_task() -> None:
    """Golds yes, yes, no of one task and yes three times of another: 2/3 and 1, whatever the models said."""
    tasks, _ = world(2)
    examples = [example("t0", "e0"), example("t0", "e1"), example("t0", "e2", gold="no")]
    examples += [example("t1", f"e{i}", gold="Yes.") for i in range(3)]
    pairs, _ = evaluation.plan_pairs(tasks, examples, [w for task in tasks for w in wordings(task.id)], table())
    outputs = {"gold": by_rule(pairs, lambda pair: pair.example.outputs[0]), "wrong": by_rule(pairs, lambda _: "maybe")}
    content = summary.summarise(tasks, pairs, outputs, table(), seed=0).summary
    found = content.constant_answer
    assert found is not None and found.accuracy.mean == pytest.approx(5 / 6)
    assert found.differences["gold"].mean == pytest.approx(1 / 6)
    assert found.differences["wrong"].mean == pytest.approx(-5 / 6)


def test_shares_of_outcomes_sum_to_one() -> None:
    for model in results().models.values():
        shares = [model.all.of(key).mean for key in ("always_right", "always_wrong_alike", "inconsistent", "mixed")]
        assert sum(shares) == pytest.approx(1.0)


def test_many_tasks_are_bootstrapped() -> None:
    tasks, pairs = world(22)
    outputs = {
        "a": by_rule(pairs, lambda p: "yes" if int(p.example.task[1:]) % 3 else "no"),
        "b": by_rule(pairs, half_right),
    }
    content = summary.summarise(tasks, pairs, outputs, table(), seed=0).summary
    accuracy = content.models["a"].all.accuracy
    assert accuracy.method == "bootstrap"
    worst = content.models["b"].all.worst_wording
    assert worst.method == "t", "a minimum is lower in a resample of few inputs than in all of them"
    assert worst.low <= worst.mean <= worst.high
    assert accuracy.low < accuracy.mean < accuracy.high
    assert content == summary.summarise(tasks, pairs, outputs, table(), seed=0).summary


def test_intervals_of_shares_end_at_0_and_1() -> None:
    """Where Student's t would go beyond; those of differences, and of corrected CR below 0, are as they are."""
    tasks, pairs = world(8)
    outputs = {
        "most": by_rule(pairs, lambda p: "no" if p.example.task == "t0" else "yes"),
        "few": by_rule(pairs, lambda p: "yes" if p.example.task == "t0" else "no"),
        "half": by_rule(pairs, lambda p: half_right(p) if p.example.task != "t0" else p.wording.id),
    }
    content = summary.summarise(tasks, pairs, outputs, table(), seed=0).summary
    most, few, half = content.models.values()
    assert (most.all.accuracy.mean, most.all.accuracy.high) == (pytest.approx(7 / 8), 1.0)
    assert (few.all.worst_wording.mean, few.all.worst_wording.low) == (pytest.approx(1 / 8), 0.0)
    assert half.all.corrected_cr.low < -0.3
    moved = next(row.estimate for row in content.differences if row.metric == "accuracy")
    assert moved.mean == pytest.approx(-6 / 8) and moved.low < -1.0


def test_three_wordings_give_no_cr() -> None:
    tasks, pairs = world(2, num_wordings=3)
    content = summary.summarise(tasks, pairs, {"m": by_rule(pairs, half_right)}, table(), seed=0).summary
    assert content.models["m"].all.cr.mean is None
    assert content.models["m"].all.accuracy.mean == pytest.approx(2 / 3)
    assert content.num_tasks_in_cr == 0
    dev = summary.summarise(tasks, pairs, {"m": by_rule(pairs, half_right)}, table(split="dev"), seed=0).summary
    assert dev.models["m"].all.cr.mean == pytest.approx(1 / 3)


def test_silent_answers_agree_with_nothing_and_are_wrong() -> None:
    tasks, pairs = world(1, num_inputs=3)
    answers = [response(pair, "", canonical="") for pair in pairs[:4]]
    answers += [response(pair, "yes", finish="length") for pair in pairs[4:8]]
    answers += [response(pair, "maybe", canonical=None) for pair in pairs[8:]]
    content = summary.summarise(tasks, pairs, {"m": ModelOutput(answers)}, table(), seed=0).summary
    model = content.models["m"]
    assert model.all.cr.mean == model.all.mcr.mean == model.all.accuracy.mean == 0.0
    assert model.counts == AnswerCounts(answers=12, tokens=12, empty=4, cut_off=4, foreign_vocabulary=4)
    assert model.noise.temperature.cr is None


def test_pairs_that_one_model_lacks_are_left_out_for_all() -> None:
    tasks, pairs = world(1, num_wordings=5)
    outputs = {"a": by_rule(pairs, half_right), "b": by_rule(pairs[1:], half_right)}
    found = summary.summarise(tasks, pairs, outputs, table(), seed=0)
    assert [row["reason"] for row in found.dropped] == ["not_every_model"]
    content = found.summary
    assert content.num_pairs == len(pairs) - 1
    assert content.models["a"].all.cr == content.models["b"].all.cr


def test_every_distinct_pair_is_decided_once() -> None:
    tasks, pairs = world(2)
    asked: list[tuple[str, str]] = []

    def decide(found: list[tuple[str, str]]) -> list[bool]:
        asked.extend(found)
        return [True] * len(found)

    content = summary.summarise(tasks, pairs, {"m": by_rule(pairs, half_right)}, table(), 0, decide).summary
    assert [set(pair) for pair in asked] == [{"yes", "no"}]
    model = content.models["m"]
    assert model.all.cr.mean == model.all.expected_cr.mean == model.all.mixed.mean == 1.0


def test_most_inconsistent_inputs_come_first() -> None:
    tasks, pairs = world(3)
    words = {"e0": "aaaa", "e1": "aabb", "e2": "abcd"}
    output = by_rule(pairs, lambda pair: words[pair.example.id][int(pair.wording.id[1])])
    content = summary.summarise(tasks, pairs, {"m": output}, table(), seed=0).summary
    rows = content.most_inconsistent
    assert [row.example for row in rows] == ["e2"] * 3 + ["e1"] * 3
    assert [answer.text for answer in rows[0].answers] == list("abcd")


@pytest.mark.parametrize(("form", "cr", "accuracy"), [((), 1.0, 1.0), (("case",), 1 / 3, 0.5)])
def test_case_counts_where_the_task_says_so(form: tuple[str, ...], cr: float, accuracy: float) -> None:
    """Of four wordings two say mW and two MW, by all of: CR, accuracy, the noise floor and the kinds of failure."""
    task = Task("t", "Which unit?", labels=("MW", "mW"), answer_form=form)
    examples = [Example(f"e{i}", "t", f"input {i}", ("mW",), "test") for i in range(3)]
    pairs = [Pair(e, Wording(f"w{j}", "t", f"Ask {j}"), "") for e in examples for j in range(4)]

    def say(pair: Pair, text: str, sample: int = 0) -> Response:
        return Response(pair.example.id, "t", pair.wording.id, sample, text, text, "stop", 1)

    answers = [say(pair, "mW" if pair.wording.id in ("w0", "w1") else "MW.") for pair in pairs]
    repeats = [say(pairs[0], ("mW", "MW")[i % 2], i) for i in range(4)]
    found = summary.summarise([task], pairs, {"m": ModelOutput(answers, repeats, repeats)}, table(), seed=0).summary
    model = found.models["m"]
    assert model.all.cr.mean == pytest.approx(cr) and model.all.accuracy.mean == pytest.approx(accuracy)
    assert model.noise.temperature.cr == pytest.approx(cr)
    assert found.failures.models["m"].another == round(12 * (1 - accuracy))
