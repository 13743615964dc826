"""verdicts and calibration: rules, known answers, thresholds and quality against brute force, no duplicate requests."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from coalign.config import Config, JudgeTable
from coalign.config_values import table_values
from coalign.judging import calibration, known_answers
from coalign.judging.judge_model import all_prompts
from coalign.judging.verdicts import (
    DistinctAnswer,
    count_judging,
    decide_by_judge,
    decide_by_rule,
    decide_by_rules,
    decide_by_scores,
    describe_verdicts,
    distinct_answers,
    with_questions,
)
from coalign.records import Example, Response, Task, Verdict
from coalign.text import normalise_answer

LABELS = Task("mood", "Is the review positive or negative?", ("positive", "negative"))
YES_NO = Task("entails", "Does it follow?", ("yes", "no"))
FREE = Task("title", "Write a title.")
TASKS = {task.id: task for task in (LABELS, YES_NO, FREE)}


def response(text: str, canonical: str | None = "same", finish: str = "stop", **changes: object) -> Response:
    values = {"example": "e1", "task": "mood", "wording": "w", "sample": 0, "num_tokens": 3, **changes}
    return Response(text=text, canonical=text if canonical == "same" else canonical, finish=finish, **values)  # type: ignore[arg-type]


def dev_examples(count: int) -> list[Example]:
    return [
        example
        for i in range(count)
        for example in (
            Example(f"m{i}", "mood", f"review {i}", (("positive", "negative")[i % 2],), "dev"),
            Example(f"n{i}", "entails", f"premise {i}", (("yes", "no")[i % 2],), "dev"),
            Example(f"t{i}", "title", f"article {i}", (f"Title {i}", f"Heading {i}"), "dev"),
        )
    ]


def test_distinct_answers_counts_text_and_finish_and_drops_foreign_words() -> None:
    responses = [
        response("great", "positive"),
        response("positive", wording="w2"),
        response("positive", finish="length"),
        response("Positive"),
        response("positive", example="e2"),
        response("yes", None),
    ]
    answers, dropped = distinct_answers(responses)
    assert answers == [
        DistinctAnswer("mood", "e1", "positive", "stop"),
        DistinctAnswer("mood", "e1", "positive", "length"),
        DistinctAnswer("mood", "e1", "Positive", "stop"),
        DistinctAnswer("mood", "e2", "positive", "stop"),
    ]
    assert [(row["reason"], row["text"]) for row in dropped] == [("foreign_vocabulary", "yes")]


@pytest.mark.parametrize(
    ("text", "finish", "golds", "expected"),
    [
        ("", "stop", ("positive",), (0, "empty")),
        ("", "length", ("positive",), (0, "empty")),
        ("positive", "length", ("positive",), (0, "cut_off")),
        (" Positive. ", "stop", ("negative", "positive"), (2, "exact_match")),
        ("positive", "stop", (), None),
        ("very positive", "stop", ("positive",), None),
    ],
)
def test_rules(text: str, finish: str, golds: tuple[str, ...], expected: tuple[int, str] | None) -> None:
    verdict = decide_by_rule(DistinctAnswer("mood", "e1", text, finish), golds)  # type: ignore[arg-type]
    assert (verdict and (verdict.reward, verdict.rule)) == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"type": -0.1, "correct": 5.0}, (0, "type")),
        ({"type": 0.0, "correct": 0.0}, (2, "correct")),
        ({"type": 0.1, "correct": -0.1}, (1, "correct")),
        ({"correct": 0.1}, (2, "correct")),
        ({"correct": -0.1}, (1, "correct")),
    ],
)
def test_scores_to_reward(scores: dict[str, float], expected: tuple[int, str]) -> None:
    verdict = decide_by_scores(DistinctAnswer("mood", "e1", "x", "stop"), scores)
    assert (verdict.reward, verdict.rule) == expected
    assert verdict.type_score == scores.get("type")
    assert verdict.correct_score == scores["correct"]


def test_no_gold_appears_anywhere_without_gold() -> None:
    examples = {("mood", "e1"): Example("e1", "mood", "Nice film", ("GOLDWORD",), "align")}
    answer = DistinctAnswer("mood", "e1", "GOLDWORD", "stop")
    assert decide_by_rules([answer], examples, gold=False) == ({}, [answer])
    table = JudgeTable(gold=False)
    other = DistinctAnswer("mood", "e1", "bad", "stop")
    ((_, prompts),) = with_questions([other], TASKS, examples, table)
    assert set(prompts) == {"type", "correct"}
    assert not any("GOLDWORD" in prompt for prompt in all_prompts(prompts))
    assert all(LABELS.instruction in prompt for prompt in all_prompts(prompts))
    ((_, with_gold),) = with_questions([other], TASKS, examples, JudgeTable())
    assert "GOLDWORD" in with_gold["correct"][0]
    assert "GOLDWORD" not in with_gold["type"][0]
    ((_, control),) = with_questions([other], TASKS, examples, JudgeTable(type_question=False))
    assert set(control) == {"correct"}


LISTS = JudgeTable(item_separator=",")
FRUIT = {("title", "e1"): Example("e1", "title", "Which?", ("fig, plum",), "align")}


@pytest.mark.parametrize(
    ("text", "scores", "reward", "rule"),
    [
        ("fig,plum", {}, 2, "correct"),
        ("fig, pear", {"Expected: plum\nResponse: pear": -2.0}, 1, "correct"),
        ("pear, plum", {"Expected: fig\nResponse: pear": -2.0}, 1, "correct"),
        ("plum, fig", {"Expected: fig\nResponse: plum": -9.0, "Expected: plum\nResponse: fig": 3.0}, 1, "correct"),
        ("fig", {}, 1, "item_count"),
        ("fig, plum, pear", {}, 1, "item_count"),
        ("fig, plum, pear", {"Is the response the kind": -1.0}, 0, "type"),
        (", ,", {}, 1, "item_count"),
    ],
)
def test_lists_are_judged_item_by_item(text: str, scores: dict[str, float], reward: int, rule: str) -> None:
    """`scores` are those below 1, by what is in the prompt."""
    asked = with_questions([DistinctAnswer("title", "e1", text, "stop")], TASKS, FRUIT, LISTS)

    def score(prompt: str) -> float:
        return next((value for part, value in scores.items() if part in prompt), 1.0)

    ((_, by_question),) = asked
    assert "fig, plum" not in "".join(all_prompts(by_question)) or text in by_question["type"][0]
    decided, _ = decide_by_judge(asked, score, {"type": 0.0, "correct": 0.0})
    assert [(v.reward, v.rule) for v in decided.values()] == [(reward, rule)]


def test_without_gold_there_is_nothing_to_compare_item_by_item() -> None:
    table = LISTS.model_copy(update={"gold": False})
    ((_, by_question),) = with_questions([DistinctAnswer("title", "e1", "fig", "stop")], TASKS, FRUIT, table)
    assert [len(prompts) for prompts in by_question.values()] == [1, 1]
    assert "Response: fig" in by_question["correct"][0]


def test_an_answer_that_the_number_of_items_decides_does_not_measure_the_judge() -> None:
    known = [known_answers.KnownAnswer("title", "e1", text, "wrong", "fit") for text in ("fig", "fig, pear")]
    asked = with_questions(known, TASKS, FRUIT, JudgeTable(item_separator=",", type_question=False))
    samples = calibration.collect_samples(asked, lambda prompt: -3.0 if "pear" in prompt else 2.0)
    assert samples == {("correct", "fit"): ([], [-3.0])}


def test_calibration_answers_are_what_they_claim() -> None:
    examples = {(e.task, e.id): e for e in dev_examples(20)}
    known = known_answers.calibration_answers(TASKS, list(examples.values()), 1000, seed=3)
    for answer in known:
        example, task = examples[answer.task, answer.example], TASKS[answer.task]
        golds = {normalise_answer(gold) for gold in example.outputs}
        assert (normalise_answer(answer.text) in golds) == (answer.kind == "right")
        if answer.kind == "wrong" and task.labels:
            assert answer.text in task.labels
        if answer.kind == "wrong" and not task.labels:
            assert answer.text.startswith(("Title", "Heading"))
        if answer.kind == "wrong_type":
            assert answer.text not in task.labels
            assert task.labels or answer.text in (*LABELS.labels, *YES_NO.labels)
    assert len(known) == 3 * len(examples)
    parts = {(k.task, k.example): k.part for k in known}
    assert sorted(parts.values()).count("fit") == len(examples) / 2
    assert all(k.part == parts[k.task, k.example] for k in known)
    # The first reference is in the prompt, so another one is the right answer to judge.
    assert {k.text[:7] for k in known if k.task == "title" and k.kind == "right"} == {"Heading"}


def test_calibration_answers_are_limited_repeatable_and_seeded() -> None:
    examples = dev_examples(20)

    def chosen(examples: list[Example], seed: int) -> set[tuple[str, str]]:
        return {(k.part, k.example) for k in known_answers.calibration_answers(TASKS, examples, 10, seed)}

    assert len(chosen(examples, 3)) == 10
    assert chosen(examples, 3) == chosen(examples[::-1], 3)
    assert chosen(examples, 3) != chosen(examples, 4)
    unseen = {**TASKS, "title": Task("title", "Write a title.", seen=False)}
    assert not [k for k in known_answers.calibration_answers(unseen, examples, 1000, seed=3) if k.task == "title"]


def test_an_only_task_has_no_wrong_type_and_a_lone_free_example_no_wrong_answer() -> None:
    lone = [Example("t0", "title", "article", ("Title",), "dev")]
    assert [k.kind for k in known_answers.calibration_answers({"title": FREE}, lone, 10, seed=0)] == ["right"]


def test_audit_takes_a_seeded_share() -> None:
    examples = dev_examples(100)
    verdicts = [Verdict(e.id, e.task, e.outputs[0], "stop", 2, "exact_match") for e in examples]
    verdicts.append(Verdict("m0", "mood", "other", "stop", 0, "cut_off"))
    known = known_answers.audit_answers(TASKS, examples, verdicts, 0.25, seed=1)
    right = [k for k in known if k.kind == "right"]
    wrong = [k for k in known if k.kind == "wrong"]
    assert 45 < len(right) < 105
    assert 45 < len(wrong) < 105
    assert not known_answers.audit_answers(TASKS, examples, verdicts, 0.0, seed=1)
    everything = known_answers.audit_answers(TASKS, examples, verdicts, 1.0, seed=1)
    assert len(everything) == 2 * len(examples)
    assert {k.text for k in everything} >= {"positive", "yes", "Title 3"}


def brute_auc(yes: list[float], no: list[float]) -> float:
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in yes for b in no]
    return sum(wins) / len(wins)


def test_auc_and_threshold_against_brute_force() -> None:
    generator = random.Random(0)
    for _ in range(50):
        yes = [generator.randint(-3, 6) / 2 for _ in range(generator.randint(8, 15))]
        no = [generator.randint(-6, 3) / 2 for _ in range(generator.randint(8, 15))]
        assert calibration.auc(yes, no) == pytest.approx(brute_auc(yes, no))
        threshold = calibration.fit_threshold(yes, no)
        scores = sorted({*yes, *no})
        midpoints = [(a + b) / 2 for a, b in itertools.pairwise(scores)]
        best = max(calibration.balanced_accuracy(yes, no, t) for t in midpoints)
        assert calibration.balanced_accuracy(yes, no, threshold) == pytest.approx(best)
        equal = [t for t in midpoints if calibration.balanced_accuracy(yes, no, t) == pytest.approx(best)]
        assert abs(threshold) == min(abs(t) for t in equal)


def test_hand_computed_quality() -> None:
    assert calibration.auc([2.0, 0.0], [0.0, -1.0]) == (1 + 1 + 0.5 + 1) / 4
    quality = calibration.measure([2.0, 0.0, -1.0, 3.0], [0.5, -1.0], 0.0)
    assert quality["balanced_accuracy"] == (3 / 4 + 1 / 2) / 2
    assert quality["false_correct"] == 1 / 2
    assert quality["false_incorrect"] == 1 / 4
    assert calibration.measure([1.0], [], 0.0)["auc"] is None
    assert calibration.fit_threshold([1.0] * 8, [1.0] * 8) == 0.0


def test_few_dev_rows_leave_the_threshold_at_zero_and_say_so() -> None:
    samples = calibration.collect_samples([], lambda prompt: 0.0)
    samples["correct", "fit"] = ([3.0] * 7, [2.0] * 50)
    samples["correct", "check"] = ([3.0] * 7, [-2.0] * 50)
    found = calibration.calibrate(samples, with_type=False)
    assert list(found) == ["correct"]
    assert found["correct"]["threshold"] == 0.0
    assert found["correct"]["fitted"] is False
    assert "not fitted" in calibration.describe_calibration(found)[0]
    samples["correct", "fit"] = ([3.0] * 8, [2.0] * 50)
    assert calibration.calibrate(samples, with_type=False)["correct"]["threshold"] == 2.5


def test_thresholds_come_from_one_half_and_quality_from_the_other() -> None:
    examples = dev_examples(40)
    by_key = {(e.task, e.id): e for e in examples}
    known = known_answers.calibration_answers(TASKS, examples, 1000, seed=0)
    asked = with_questions(known, TASKS, by_key, JudgeTable())
    truth = {by_question["correct"][0]: k.kind == "right" for k, by_question in asked}
    # A judge that says 4 / 2 on one half and the reverse on the other: fitted well, measured as useless.
    shared = {p for k, by_question in asked for p in all_prompts(by_question) if k.part == "fit"}

    def scores(prompt: str) -> float:
        right = truth.get(prompt, True)
        return 4.0 if right == (prompt in shared) else 2.0

    samples = calibration.collect_samples([(k, p) for k, p in asked if k.task == "title"], scores)
    found = calibration.calibrate(samples, with_type=True)
    assert found["correct"]["threshold"] == 3.0
    assert found["correct"]["quality"]["auc"] == 0.0


def weakness(**qualities: dict[str, Any]) -> str | None:
    return calibration.weakness({name: {"quality": quality} for name, quality in qualities.items()}, JudgeTable())


def test_a_weak_judge_that_is_allowed_is_described_without_advice() -> None:
    bad = {"correct": {"quality": calibration.measure([1.0, -1.0], [1.0, -1.0], 0.0)}}
    message = calibration.weakness(bad, JudgeTable(allow_weak=True)) or ""
    assert "too weak" in message and "allow_weak" not in message and "judge.model" not in message


def test_weak_judge_stops_with_its_numbers_and_the_ways_out() -> None:
    good = calibration.measure([1.0] * 9, [-1.0] * 9, 0.0)
    assert weakness(correct=good) is None
    assert weakness(type=good, correct=good) is None
    message = weakness(correct=calibration.measure([1.0, -1.0], [1.0, -1.0], 0.0))
    assert message is not None
    assert "the correctness question" in message and "type" not in message
    for word in ("0.500", "judge.min_quality=0.65", "judge.model", "sft.replay", "judge.allow_weak"):
        assert word in message
    # AUC alone can be good while the threshold is not.
    assert weakness(correct=calibration.measure([5.0] * 9, [4.0] * 9, 0.0)) is not None
    assert "can't be measured" in (weakness(correct=calibration.measure([1.0], [], 0.0)) or "")


def test_a_judge_weak_at_the_type_question_alone_stops_too() -> None:
    """The message names the question, and leaving it out as one more way on."""
    good, bad = calibration.measure([1.0] * 9, [-1.0] * 9, 0.0), calibration.measure([1.0, -1.0], [1.0, -1.0], 0.0)
    message = weakness(type=bad, correct=good) or ""
    assert message.startswith("the type question: the judge is too weak")
    assert "the correctness question" not in message and "judge.type_question=false" in message
    alone = calibration.measure([1.0] * 9, [], 0.0)  # one task: no wrong type is known
    assert weakness(type=alone, correct=good) is None
    both = weakness(type=bad, correct=bad) or ""
    assert "the type question" in both and "the correctness question" in both


def test_going_on_with_a_weak_judge_makes_no_step_stale() -> None:
    keys = table_values(Config(), ("judge",), with_neutral=False)
    assert "judge.allow_weak" not in keys
    assert "judge.min_quality" not in keys
    assert "judge.gold" in keys


def test_too_long_prompts_leave_the_response_out_or_stop() -> None:
    answers = [DistinctAnswer("mood", "e1", "fine", "stop"), DistinctAnswer("mood", "e2", "long", "stop")]
    asked = [(a, {"type": (f"type {a.text}",), "correct": (f"correct {a.text}",)}) for a in answers]
    scores = {"type fine": 3.0, "correct fine": 1.0, "type long": 1.0, "correct long": None}
    decided, dropped = decide_by_judge(asked, scores.__getitem__, {"type": 1.0, "correct": 2.0})
    verdict = decided[answers[0]]
    assert (verdict.reward, verdict.type_score, verdict.correct_score) == (1, 2.0, -1.0)
    assert list(decided) == answers[:1]
    assert [(row["reason"], row["example"]) for row in dropped] == [("too_long", "e2")]


def test_counts_add_up() -> None:
    responses = [
        response("positive"), response("positive", wording="w2"), response("bad"), response("bad", example="e2"),
        response("", finish="length"), response("yes", None),
    ]  # fmt: skip
    examples = {("mood", e): Example(e, "mood", "x", ("positive",), "align") for e in ("e1", "e2")}
    answers, dropped = distinct_answers(responses)
    decided, undecided = decide_by_rules(answers, examples, gold=True)
    asked = with_questions(undecided, TASKS, examples, JudgeTable())
    # Both inputs read "x" and have the same gold: their prompts are the same, two questions in all.
    assert len({prompt for _, by_question in asked for prompt in all_prompts(by_question)}) == 2
    judged, _ = decide_by_judge(asked, lambda prompt: -1.0, {"type": -2.0, "correct": 0.0})
    counts = count_judging(responses, asked, decided | judged, dropped, 2, 2)
    assert counts["calls"] == {"asked": 2, "saved_by_duplicates": 4, "saved_by_rules": 4}
    assert counts["rewards"] == {"0": 1, "1": 2, "2": 1}
    assert counts["rules"] == {"correct": 2, "empty": 1, "exact_match": 1}
    assert counts["dropped"] == {"foreign_vocabulary": 1}
    assert counts["rewards_by_task"] == {"mood": {"0": 1, "1": 2, "2": 1}}
    assert any("foreign_vocabulary: 1" in line for line in describe_verdicts(counts))


@pytest.mark.parametrize(
    ("text", "gold", "form", "equal"),
    [
        ("<42", ">42", (), False),
        ("5", "5!", (), False),
        ("O(n)", "O(n!)", (), False),
        ("10²", "102", (), False),
        ("if a:\n  b\n  c", "if a:\n  b\nc", (), False),
        ("mW", "MW", (), True),
        ("mW", "MW", ("case",), False),
        ("a b", "a\nb", ("space",), False),
        ("1,000", "1000", (), True),
        ("1,000", "1000", ("numbers",), False),
        ("是。", "是", (), True),
        ("−5", "-5", (), True),
    ],
)
def test_an_exact_match_is_one_by_the_form_of_the_task(
    text: str, gold: str, form: tuple[str, ...], equal: bool
) -> None:
    answer = DistinctAnswer("t", "e", text, "stop")
    examples = {("t", "e"): Example("e", "t", "in", (gold,), "align")}
    tasks = {"t": Task("t", "Do.", answer_form=form)}
    decided, undecided = decide_by_rules([answer], examples, gold=True, tasks=tasks)
    assert [verdict.reward for verdict in decided.values()] == ([2] if equal else [])
    assert undecided == ([] if equal else [answer])
