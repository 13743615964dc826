"""The judge of agreement: pairs whose verdict is known, both orders, threshold and quality, and what it is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from coalign.config import EvalTable
from coalign.errors import UserError
from coalign.evaluation import agreement
from coalign.records import Example, Row, Task
from coalign.text import normalise_answer

TASKS = [Task("mood", "Good or bad?", ("good", "bad")), Task("city", "Which city?")]
CITIES = ["Rome", "Paris", "Oslo", "Bern", "Wien", "Kiew", "Riga", "Lima"]


def examples(count: int, split: str = "dev") -> list[Example]:
    """Return moods with one gold answer, and cities of which every other one has two."""
    made = []
    for number in range(count):
        mood, city = ("good", "bad")[number % 2], CITIES[number % len(CITIES)]
        two = (city, f"{city} City") if number % 2 else (city,)
        made.append(Example(f"m{number}", "mood", f"text {number}", (mood,), split))  # type: ignore[arg-type]
        made.append(Example(f"c{number}", "city", f"country {number}", two, split))  # type: ignore[arg-type]
    return made


class Letters:
    """A codec of one token per byte."""

    max_tokens = 10_000

    def encode_prompt(self, user_text: str) -> list[int]:
        return list(user_text.encode())

    def encode_plain(self, text: str) -> list[int]:
        return list(text.encode())


def judge_by(verdict: Callable[[str, str], float], dropped: list[Row] | None = None) -> agreement.JudgeOfAgreement:
    """Return a judge whose log-odds for (answer A, answer B) a function gives."""

    def score(requests: list[Row], name: str) -> Iterable[Row]:
        for request in requests:
            lines = bytes(request["prompt_ids"]).decode().splitlines()
            odds = verdict(lines[0].removeprefix("Answer A: "), lines[1].removeprefix("Answer B: "))
            yield {"pair": request["pair"], "logps": [odds, 0.0]}

    return agreement.JudgeOfAgreement(Letters(), "drop", score, [] if dropped is None else dropped)


def bare(answer: str) -> str:
    return answer.removeprefix("the answer is ").removesuffix(" city")


def truth(first: str, second: str) -> float:
    return 3.0 if bare(first) == bare(second) else -3.0


def test_known_pairs_are_alike_and_unlike_in_the_same_form() -> None:
    known = agreement.known_pairs(TASKS, examples(20) + examples(9, "test"), "test", 0)
    assert {(pair.part, pair.same) for pair in known} == {(p, s) for p in ("fit", "check") for s in (True, False)}
    for pair in known:
        first, second = pair.answers
        assert (first, second) == (normalise_answer(first), normalise_answer(second)) and first != second
        assert pair.same == (truth(first, second) > 0)
    for same in (True, False):  # no form of a pair gives its verdict away
        assert any(p.answers[1].startswith("the answer is ") for p in known if p.same == same)
        assert any(not p.answers[1].startswith("the answer is ") for p in known if p.same == same)
    assert not agreement.known_pairs(TASKS, examples(5, "test"), "test", 0), "the inputs under test are left alone"
    assert known == agreement.known_pairs(TASKS, examples(20), "test", 0)


def test_a_judge_decides_by_its_own_threshold_and_only_what_it_says_in_both_orders() -> None:
    """It says yes to everything, but less loudly to unlike pairs: a threshold of 0 would call all of them the same."""
    order = {("rome", "milan"): 9.0, ("milan", "rome"): -9.0}
    judge = judge_by(lambda a, b: order.get((a, b), 5.0 + truth(a, b)))
    judge.measure(agreement.known_pairs(TASKS, examples(40), "test", 0), EvalTable())
    assert judge.threshold == pytest.approx(5.0)
    pairs = [("rome", "the answer is rome"), ("rome", "paris"), ("rome", "milan"), ("milan", "rome")]
    assert judge.decide(pairs) == [True, False, False, False]
    found = judge.result()
    assert found.fitted and found.balanced_accuracy == found.auc == 1.0 and found.unlike_called_alike == 0.0
    assert (found.num_pairs, found.num_agreeing, found.order_decides) == (4, 1, 0.5)
    said = agreement.describe_judge(found)
    assert "balanced accuracy 1.00, unlike answers called the same 0.00" in said and "of 4 pairs 0.50 by order" in said


def test_its_error_rates_are_those_of_pairs_that_did_not_fit_it() -> None:
    """A judge that takes every seventh unlike pair for the same errs as often as counting by hand says."""
    known = agreement.known_pairs(TASKS, examples(60), "test", 0)
    unlike = [pair.answers for pair in known if not pair.same]
    wrong = set(unlike[::7])
    judge = judge_by(lambda a, b: 1.0 if (a, b) in wrong or (b, a) in wrong else truth(a, b))
    judge.measure(known, EvalTable())
    checked = [pair for pair in known if not pair.same and pair.part == "check"]
    by_hand = sum(p.answers in wrong or p.answers[::-1] in wrong for p in checked) / len(checked)
    found = judge.result()
    assert found.num_unlike == len(checked)
    if judge.threshold <= 1.0:
        assert found.unlike_called_alike == by_hand > 0
    assert found.order_decides is None


@pytest.mark.parametrize(
    ("odds", "says"),
    [
        (lambda a, b: 1.0, "the judge is too weak: on"),
        (lambda a, b: -truth(a, b), "the judge is too weak: on"),
        (lambda a, b: 3.0 if a < b else -3.0, "the judge is too weak: on"),  # the order alone decides
    ],
)
def test_a_weak_judge_stops_the_step_or_is_named(
    odds: Callable[[str, str], float], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    known = agreement.known_pairs(TASKS, examples(40), "test", 0)
    table = EvalTable(agreement="models/judge")
    with pytest.raises(UserError, match=f"eval.agreement='models/judge': {says}.*eval.min_quality=0.65.*allow_weak"):
        judge_by(odds).measure(known, table)
    judge = judge_by(odds)
    judge.measure(known, table.model_copy(update={"allow_weak": True}))
    assert "continuing with a weak judge of agreement" in caplog.text
    assert (judge.result().balanced_accuracy or 0.0) <= 0.65


def test_a_judge_that_can_not_be_measured_stops_the_step() -> None:
    with pytest.raises(UserError, match="the judge can't be measured: 0 pairs that mean the same and 0 that do not"):
        judge_by(truth).measure([], EvalTable(agreement="j"))
    judge = judge_by(truth)
    judge.measure([], EvalTable(agreement="j", allow_weak=True))
    assert "not measured" in agreement.describe_judge(judge.result())


def test_pairs_that_are_too_long_are_listed_and_do_not_agree() -> None:
    dropped: list[Row] = []
    judge = judge_by(truth, dropped)
    judge.measure(agreement.known_pairs(TASKS, examples(40), "test", 0), EvalTable())
    assert judge.decide([("x" * 20_000, "y"), ("a", "the answer is a")]) == [False, True]
    assert [row["reason"] for row in dropped] == ["too_long_for_judge"]
    assert judge.result().num_pairs == 1
