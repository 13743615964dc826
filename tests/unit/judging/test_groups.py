"""groups: merging, the one best answer, groups under each wording, control arms; hand-computed cases."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from coalign.config import RankTable
from coalign.errors import UserError
from coalign.judging import best_answer
from coalign.judging.best_answer import RankRules, best_of
from coalign.judging.groups import describe_groups, explain_no_groups, limit_candidates, make_groups, require_gold
from coalign.records import Candidate, Example, Group, Response, Verdict, Wording

EXAMPLE = Example("e1", "mood", "Nice film", ("positive", "pos"), "align")
PLAIN = Wording("plain", "mood", "Positive or negative?")
OTHER = Wording("other", "mood", "Which mood?")
MAPPED = Wording("mapped", "mood", "Is it great or awful?", answers={"positive": "great", "negative": "awful"})
WORDINGS = {("mood", w.id): w for w in (PLAIN, OTHER, MAPPED)}
EXAMPLES = {("mood", "e1"): EXAMPLE}


def said(wording: str, canonical: str | None, finish: str = "stop", example: str = "e1") -> Response:
    return Response(example, "mood", wording, 0, canonical or "?", canonical, finish, 2)  # type: ignore[arg-type]


def verdict(text: str, reward: int, finish: str = "stop", example: str = "e1") -> Verdict:
    return Verdict(example, "mood", text, finish, reward, "correct")  # type: ignore[arg-type]


def groups_of(
    responses: list[Response], verdicts: list[Verdict], gold: bool = True, seed: int = 0, **table: Any
) -> tuple[list[Group], list[dict[str, Any]], dict[str, Any]]:
    return make_groups(responses, verdicts, EXAMPLES, WORDINGS, RankRules(RankTable(**table), gold, seed))


def shown(group: Group) -> list[tuple[str, int, bool]]:
    return [(c.text, c.reward, c.best) for c in group.candidates]


def test_equal_texts_merge_over_wordings_and_finish() -> None:
    responses = [
        said("plain", "negative"), said("other", "positive", "length"), said("mapped", "positive"),
        said("plain", "positive"), said("mapped", "positive"), said("plain", None), said("plain", "unjudged"),
        said("plain", "", "length"), said("plain", "Positive."),
    ]  # fmt: skip
    verdicts = [
        verdict("negative", 1), verdict("positive", 0, "length"), verdict("positive", 2), verdict("", 0, "length"),
        verdict("Positive.", 2),
    ]  # fmt: skip
    table = {(v.task, v.example, v.text, v.finish): v for v in verdicts}
    assert best_answer.distinct_candidates(responses, table, EXAMPLE.outputs) == [
        Candidate("negative", 1, "stop", 1, ("plain",)),
        Candidate("positive", 2, "stop", 4, ("other", "mapped", "plain")),
        Candidate("Positive.", 2, "stop", 1, ("plain",)),
    ]


def candidate(text: str, reward: int, wordings: str = "a") -> Candidate:
    return Candidate(text, reward, "stop", 1, tuple(wordings))


@pytest.mark.parametrize(
    ("items", "gold", "best"),
    [
        ([candidate("positive", 1, "abc"), candidate("b", 2)], True, "b"),
        ([candidate("a", 2, "abc"), candidate("positive", 2)], True, "positive"),
        ([candidate("a", 2, "abc"), candidate("positive", 2)], False, "a"),
        ([candidate("positive", 2, "ab"), candidate("pos", 2, "abc")], True, "pos"),
    ],
)
def test_best_is_reward_then_exact_then_wordings(items: list[Candidate], gold: bool, best: str) -> None:
    for order in (items, items[::-1]):
        ranked, joined = best_answer.rank_candidates(order, EXAMPLE, RankRules(RankTable(), gold, 0))
        assert [item.text for item in ranked if item.best] == [best]
        assert not joined


def test_a_full_tie_is_broken_alike_in_any_order() -> None:
    items = [candidate(text, 2) for text in "abcdef"]
    rules = RankRules(RankTable(), True, 0)
    chosen = {best_of(best_answer.rank_candidates(order, EXAMPLE, rules)[0]) for order in (items, items[::-1])}
    assert len(chosen) == 1 and None not in chosen


def test_groups_hold_the_answers_of_all_wordings_in_the_words_of_each() -> None:
    responses = [said("plain", "negative"), said("mapped", "positive"), said("plain", "so so")]
    verdicts = [verdict("negative", 1), verdict("positive", 2), verdict("so so", 0)]
    groups, dropped, counts = groups_of(responses, verdicts)
    assert [g.wording for g in groups] == ["plain", "mapped"]
    assert shown(groups[0]) == [("positive", 2, True), ("negative", 1, False), ("so so", 0, False)]
    assert shown(groups[1]) == [("great", 2, True), ("awful", 1, False), ("so so", 0, False)]
    assert groups[1].candidates[1].wordings == ("plain",)
    assert not dropped
    assert counts["groups"] == 2
    assert counts["sizes"] == {"3": 2}
    assert (counts["ordered_pairs"], counts["tied_pairs"]) == (6, 0)
    assert counts["share_with_ordered_pair"] == 1.0
    assert counts["gold_joined"] == 0


def test_texts_that_read_equal_under_a_wording_merge_with_the_better_reward() -> None:
    responses = [said("plain", "positive"), said("mapped", "Negative."), said("plain", "negative")]
    verdicts = [verdict("positive", 2), verdict("Negative.", 0), verdict("negative", 1)]
    groups, _, _ = groups_of(responses, verdicts)
    assert shown(groups[0]) == [("positive", 2, True), ("negative", 1, False), ("Negative.", 0, False)]
    assert shown(groups[1]) == [("great", 2, True), ("awful", 1, False)]
    assert groups[1].candidates[1].count == 2
    assert groups[1].candidates[1].wordings == ("mapped", "plain")


def test_a_text_that_means_something_else_under_a_wording_is_left_out_there() -> None:
    # "great" was said under a plain wording: free text there, but the mapped wording's word for "positive".
    responses = [said("plain", "great"), said("mapped", "negative"), said("plain", "positive")]
    verdicts = [verdict("great", 1), verdict("negative", 1), verdict("positive", 2)]
    groups, _, counts = groups_of(responses, verdicts)
    assert ("great", 1, False) in shown(groups[0])
    assert shown(groups[1]) == [("great", 2, True), ("awful", 1, False)]
    assert counts["foreign_candidates"] == 1


def foreign(wording: str, text: str, finish: str = "stop") -> Response:
    return Response("e1", "mood", wording, 0, text, None, finish, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("rewards", ["judge", "exact", "permuted"])
@pytest.mark.parametrize("pool", ["all", "own"])
def test_a_word_of_another_wording_loses_under_its_own_wording_alone(rewards: str, pool: str) -> None:
    """It has reward 0 there whatever the rewards, and is no candidate elsewhere."""
    responses = [
        said("plain", "positive"), said("mapped", "positive"), foreign("mapped", "positive"),
        foreign("mapped", " positive "), foreign("mapped", "negative", "length"), foreign("mapped", "  "),
    ]  # fmt: skip
    groups, _, counts = groups_of(responses, [verdict("positive", 2)], rewards=rewards, pool=pool)
    assert shown(groups[0]) == [("positive", 2, True)]
    assert shown(groups[1]) == [("great", 2, True), ("positive", 0, False)]
    loser = groups[1].candidates[1]
    assert (loser.count, loser.wordings, loser.finish) == (2, ("mapped",), "stop")
    assert counts["foreign_vocabulary"] == 1
    assert any("1 candidates are words of another wording" in line for line in describe_groups(counts))


def test_a_foreign_word_alone_loses_to_the_joined_gold() -> None:
    """With rank.rewards = gold there are no losers at all."""
    responses = [foreign("mapped", "positive")]
    groups, _, counts = groups_of(responses, [])
    assert shown(groups[0]) == [("great", 2, True), ("positive", 0, False)]
    assert (counts["gold_joined"], counts["ordered_pairs"]) == (1, 1)
    groups, _, counts = groups_of(responses, [], rewards="gold")
    assert shown(groups[0]) == [("great", 2, True)]
    assert counts["foreign_vocabulary"] == 0


def test_gold_joins_when_nothing_is_correct() -> None:
    responses = [said("plain", "negative"), said("mapped", "negative")]
    groups, _, counts = groups_of(responses, [verdict("negative", 1)])
    assert shown(groups[0]) == [("positive", 2, True), ("negative", 1, False)]
    assert shown(groups[1]) == [("great", 2, True), ("awful", 1, False)]
    gold = groups[0].candidates[0]
    assert (gold.count, gold.wordings, gold.finish) == (0, (), "stop")
    assert counts["gold_joined"] == 1


def test_gold_that_was_said_but_cut_off_becomes_the_finished_best() -> None:
    groups, _, _ = groups_of([said("plain", "positive", "length")], [verdict("positive", 0, "length")])
    assert shown(groups[0]) == [("positive", 2, True)]
    assert groups[0].candidates[0].finish == "stop"
    assert groups[0].candidates[0].count == 1


def test_without_gold_an_input_without_a_correct_response_is_dropped() -> None:
    responses = [said("plain", "negative"), said("mapped", "negative")]
    groups, dropped, counts = groups_of(responses, [verdict("negative", 1)], gold=False, without_gold="judge")
    assert not groups
    assert dropped == [{"reason": "no_correct_response", "task": "mood", "example": "e1"}]
    assert counts["dropped"] == {"no_correct_response": 1}
    assert "no_correct_response: 1" in explain_no_groups(counts)


def test_without_gold_the_best_needs_the_agreement_of_enough_wordings() -> None:
    responses = [said("plain", "positive"), said("other", "negative"), said("mapped", "negative")]
    verdicts = [verdict("positive", 2), verdict("negative", 1)]  # one of three wordings said what the judge calls right
    groups, dropped, counts = groups_of(responses, verdicts, gold=False, without_gold="judge")
    assert not groups
    assert dropped == [{"reason": "too_little_agreement", "task": "mood", "example": "e1"}]
    assert "min_agreement" in explain_no_groups(counts)
    assert groups_of(responses, verdicts, gold=False, without_gold="judge", min_agreement=1 / 3)[0]
    assert groups_of(responses, verdicts, gold=True)[0]  # with gold nothing has to agree


def test_without_gold_agreement_decides_and_not_the_gold_answer() -> None:
    responses = [said("plain", "positive"), said("plain", "negative"), said("other", "negative")]
    verdicts = [verdict("positive", 2), verdict("negative", 2)]
    groups, _, _ = groups_of(responses, verdicts, gold=False)
    assert shown(groups[0])[0] == ("negative", 2, True)
    assert shown(groups_of(responses, verdicts, gold=True)[0][0])[0] == ("positive", 2, True)


def test_without_gold_most_wordings_are_right_and_the_judge_rules_out_the_wrong_type() -> None:
    responses = [said("plain", "positive"), said("other", "negative"), said("mapped", "negative")]
    verdicts = [verdict("positive", 2), verdict("negative", 1)]
    groups, _, _ = groups_of(responses, verdicts, gold=False)
    assert shown(groups[0]) == [("negative", 2, True), ("positive", 1, False)]
    groups, _, _ = groups_of(responses, [verdict("positive", 1), verdict("negative", 0)], gold=False, min_agreement=0.3)
    assert shown(groups[0]) == [("positive", 2, True), ("negative", 0, False)]
    groups, dropped, _ = groups_of(responses, verdicts, gold=False, min_agreement=0.7)
    assert not groups and {row["reason"] for row in dropped} == {"too_little_agreement"}
    groups, dropped, _ = groups_of(responses, [verdict("positive", 0), verdict("negative", 0)], gold=False)
    assert not groups and {row["reason"] for row in dropped} == {"no_correct_response"}


def test_a_generated_wording_that_gets_other_answers_is_left_out() -> None:
    astray, fine, harder = (Wording(f"model:{i}", "mood", "?", source="model") for i in range(3))
    wordings = WORDINGS | {("mood", w.id): w for w in (astray, fine, harder)}
    examples = {("mood", f"e{i}"): dataclasses.replace(EXAMPLE, id=f"e{i}") for i in range(4)}
    responses, verdicts = [], []
    for i in range(4):
        words = {"plain": "negative", "model:0": "negative", "model:1": "positive"}
        words["model:2"] = "negative" if i < 2 else "positive"
        responses += [said(wording, text, example=f"e{i}") for wording, text in words.items()]
        verdicts += [verdict("positive", 2, example=f"e{i}"), verdict("negative", 1, example=f"e{i}")]

    def left_out(least: float, **table: Any) -> tuple[list[dict[str, Any]], set[str]]:
        settings = RankTable(min_wording_agreement=least, **table)
        groups, dropped, counts = make_groups(responses, verdicts, examples, wordings, RankRules(settings, True, 0))
        assert counts["inputs"] == 4
        return dropped, {group.wording for group in groups}

    everything = {"plain", "model:0", "model:1", "model:2"}
    assert left_out(0.0) == ([], everything)
    # Of the task's 16 responses 6 are right; model:2 has half of its four, and people's own wordings always stay.
    row = {"reason": "astray_wording", "task": "mood", "wording": "model:0", "text": "?", "agreement": 0.0}
    assert left_out(0.5) == ([row], everything - {"model:0"})
    assert left_out(1.0)[1] == everything - {"model:0"}
    for rewards in ("permuted", "gold", "exact"):  # controls have the wordings of what they are compared with
        assert left_out(0.5, rewards=rewards)[1] == everything - {"model:0"}
    responses = [r for r in responses if r.example != "e0" or r.wording == "model:0"]  # nothing is left of e0
    dropped, asked = left_out(0.5)
    assert dropped == [row] and asked == everything - {"model:0"}


def test_limit_keeps_best_and_takes_lowest_and_highest_in_turn() -> None:
    best = candidate("best", 2)
    others = [
        candidate("two", 2), candidate("one", 1, wordings="ab"), candidate("one-rare", 1), candidate("zero-rare", 0),
        candidate("zero", 0, wordings="abc"),
    ]  # fmt: skip
    expected = {
        2: ["best", "zero"],
        3: ["best", "two", "zero"],
        4: ["best", "two", "zero", "zero-rare"],
        5: ["best", "two", "one", "zero", "zero-rare"],
        6: ["best", "two", "one", "one-rare", "zero", "zero-rare"],
        9: ["best", "two", "one", "one-rare", "zero", "zero-rare"],
    }
    for limit, texts in expected.items():
        for order in (others, others[::-1]):
            kept = limit_candidates(order, best, ("mood", "e1"), limit)
            assert [item.text for item in kept] == texts


def test_own_pool_keeps_responses_of_the_wording_and_the_best() -> None:
    responses = [said("plain", "negative"), said("other", "positive"), said("other", "so so")]
    verdicts = [verdict("negative", 1), verdict("positive", 2), verdict("so so", 0)]
    groups, _, _ = groups_of(responses, verdicts, pool="own")
    assert shown(groups[0]) == [("positive", 2, True), ("negative", 1, False)]
    assert shown(groups[1]) == [("positive", 2, True), ("so so", 0, False)]


def test_exact_rewards_ask_no_judge() -> None:
    responses = [said("plain", "negative"), said("plain", "pos"), said("plain", "so", "length"), said("plain", "")]
    verdicts = [verdict("negative", 2), verdict("pos", 0), verdict("so", 2, "length"), verdict("", 2)]
    groups, _, _ = groups_of(responses, verdicts, rewards="exact")
    assert {(c.text, c.reward) for c in groups[0].candidates} == {("pos", 2), ("negative", 1), ("so", 0), ("", 0)}
    assert groups[0].candidates[0].best


def test_gold_rewards_hold_the_gold_answer_alone() -> None:
    responses = [said("plain", "negative"), said("mapped", "pos")]
    groups, _, _ = groups_of(responses, [verdict("negative", 1), verdict("pos", 2)], rewards="gold")
    assert [shown(group) for group in groups] == [[("positive", 2, True)], [("great", 2, True)]]


def test_permuted_rewards_are_a_seeded_permutation_for_all_wordings_alike() -> None:
    texts = [f"t{i}" for i in range(7)] + ["positive"]
    rewards = [0, 0, 0, 1, 1, 1, 1, 2]
    responses = [said(w, text) for text in texts for w in ("plain", "other")]
    verdicts = [verdict(text, reward) for text, reward in zip(texts, rewards, strict=True)]
    seen = []
    for seed in range(10):
        groups, _, counts = groups_of(responses, verdicts, seed=seed, rewards="permuted")
        assert sorted(c.reward for c in groups[0].candidates) == sorted(rewards)
        assert groups[0].candidates == groups[1].candidates
        assert groups_of(responses, verdicts, seed=seed, rewards="permuted")[0] == groups
        assert counts["gold_joined"] == 0
        seen.append(groups[0].candidates[0].text)
    assert len(set(seen)) > 2


def test_wordings_per_input_limits_the_groups_in_a_stable_way() -> None:
    responses = [said(w, "positive") for w in ("plain", "other", "mapped")]
    groups, _, _ = groups_of(responses, [verdict("positive", 2)], wordings_per_input=2)
    again, _, _ = groups_of(responses[::-1], [verdict("positive", 2)], wordings_per_input=2)
    assert len(groups) == 2
    assert {g.wording for g in groups} == {g.wording for g in again}


def test_groups_that_cannot_be_written_are_dropped_with_a_reason() -> None:
    misfit = Wording("misfit", "mood", "{a}?", kind="template", fields_regex="Bad (?P<a>.*)")
    narrow = Wording("narrow", "mood", "Awful?", answers={"negative": "awful"})
    wordings = {("mood", w.id): w for w in (PLAIN, misfit, narrow)}
    responses = [said(w, "positive") for w in ("plain", "misfit", "narrow")]
    groups, dropped, counts = make_groups(
        responses, [verdict("positive", 2)], EXAMPLES, wordings, RankRules(RankTable(), True, 0)
    )
    assert [g.wording for g in groups] == ["plain"]
    assert [(row["wording"], row["reason"]) for row in dropped] == [
        ("misfit", "wording_does_not_fit"),
        ("narrow", "best_not_in_answer_map"),
    ]
    assert counts["dropped"] == {"best_not_in_answer_map": 1, "wording_does_not_fit": 1}


def test_a_correct_free_answer_stays_as_it_is_under_a_map() -> None:
    responses = [said("plain", "I liked it"), said("mapped", "negative")]
    groups, _, _ = groups_of(responses, [verdict("I liked it", 2), verdict("negative", 1)])
    assert shown(groups[1]) == [("I liked it", 2, True), ("awful", 1, False)]


def test_groups_without_an_ordered_pair_are_kept_and_counted() -> None:
    groups, _, counts = groups_of(
        [said("plain", "positive"), said("plain", "pos")], [verdict("positive", 2), verdict("pos", 2)]
    )
    assert len(groups) == 1
    assert (counts["ordered_pairs"], counts["tied_pairs"], counts["share_with_ordered_pair"]) == (0, 1, 0.0)
    assert any("1 ties" in line for line in describe_groups(counts))


@pytest.mark.parametrize("rewards", ["exact", "gold"])
def test_gold_rewards_contradict_a_judge_without_gold(rewards: Any) -> None:
    require_gold(RankTable(rewards=rewards), True)
    with pytest.raises(UserError, match=r"judge\.gold=false"):
        require_gold(RankTable(rewards=rewards), False)


# ---- votes by normal form


def vote(*texts: str, **table: Any) -> tuple[list[Group], list[dict[str, Any]]]:
    """Return the groups, and what was dropped, when wordings said these texts in turn and the judge accepts each."""
    wordings = {("mood", str(i)): Wording(str(i), "mood", f"Ask {i}") for i in range(len(texts))}
    responses = [said(str(i), text) for i, text in enumerate(texts)]
    rules = RankRules(RankTable(**table), False, 0)
    groups, dropped, _ = make_groups(responses, [verdict(text, 1) for text in {*texts}], EXAMPLES, wordings, rules)
    return groups, dropped


def test_spellings_of_an_answer_vote_together() -> None:
    groups, _ = vote("Rome", "Paris", "paris.", "**Paris**", "Rome", "PARIS", min_agreement=2 / 3)
    assert len(groups) == 6
    assert all(shown(group)[0] == ("**Paris**", 2, True) for group in groups)
    assert all(shown(group)[1:] == [("Rome", 1, False)] for group in groups), "no spelling of the best answer loses"
    assert groups[0].candidates[0].count == 4 and len(groups[0].candidates[0].wordings) == 4
    assert vote("Rome", "Paris", "paris.", "**Paris**", "Rome", "PARIS", min_agreement=0.7)[1]


def test_the_most_frequent_spelling_is_shown_and_the_order_does_not_matter() -> None:
    texts = ["paris", "Paris", "Rome", "Paris", "Rome!", "PARIS."]
    for order in (texts, texts[::-1], sorted(texts)):
        assert {group.candidates[0].text for group in vote(*order)[0]} == {"Paris"}
    assert vote("Rome", "paris")[0][0].candidates[0].text == vote("paris", "Rome")[0][0].candidates[0].text


def test_answers_that_mean_something_else_vote_apart() -> None:
    groups, _ = vote("<42", ">42", "<42", "<42.", "5!", "5", min_agreement=0.5)
    assert shown(groups[0]) == [("<42", 2, True), *shown(groups[0])[1:]]
    assert {text for text, reward, _ in shown(groups[0]) if reward == 1} == {">42", "5!", "5"}


def test_votes_count_case_where_the_task_does() -> None:
    candidates = [Candidate(text, 1, "stop", 1, (w,)) for text, w in (("mW", "a"), ("MW", "b"), ("MW.", "c"))]
    key = ("mood", "e1")
    assert [(c.text, c.reward) for c in best_answer.elect(candidates, key)] == [("MW", 2)]
    assert [(c.text, c.reward) for c in best_answer.elect(candidates, key, ("case",))] == [("mW", 1), ("MW", 2)]
