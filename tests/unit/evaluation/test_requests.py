"""What eval asks: pairs, repeats for the noise floors, the other generation mode, pairs for the judge of agreement."""

from __future__ import annotations

from typing import Any

import pytest

from coalign.config import GenerationTable
from coalign.errors import UserError
from coalign.evaluation import agreement, requests
from coalign.records import Example, Row, Task, Wording
from coalign.wordings.asking import Pair, Request, build_requests
from unit.worlds import WordCodec, table, world


def greedy(pairs: list[Pair]) -> list[Request]:
    """Return a greedy request for each pair."""
    return build_requests(pairs, WordCodec(), "drop", 1, lambda _: [0])[0]


def test_plan_drops_what_does_not_fit() -> None:
    tasks = [Task("t", "Ask"), Task("lonely", "Ask")]
    template = Wording("x", "t", "{a}?", "template", r"(?P<a>\d+)$", {"yes": "true"}, split="test")
    examples = [
        Example("fits", "t", "12", ("yes",), "test"),
        Example("regex", "t", "twelve", ("yes",), "test"),
        Example("map", "t", "13", ("no",), "test"),
        Example("dev", "t", "14", ("yes",), "dev"),
        Example("alone", "lonely", "1", ("yes",), "test"),
    ]
    pairs, dropped = requests.plan_pairs(tasks, examples, [template], table())
    assert [(pair.key, pair.prompt) for pair in pairs] == [(("t", "fits", "x"), "12?")]
    assert {(row.get("example"), row["reason"]) for row in dropped} == {
        ("regex", "fields_regex"),
        ("map", "answer_map"),
        (None, "no_wordings"),
    }
    with pytest.raises(UserError, match="nothing to ask"):
        requests.plan_pairs(tasks, examples, [], table())


def test_noise_requests() -> None:
    _, pairs = world(3)
    asked = greedy(pairs)
    few = requests.noise_requests(asked, 5)
    assert len({request.pair.key[:2] for request in few}) == 5
    samples = requests.seeded_samples(few, 4, seed=0)
    assert len({seed for request in samples for seed in request.seeds}) == 20


def test_no_two_repeats_of_a_request_share_a_shard_and_each_has_other_neighbours() -> None:
    """A repeat is one shard: every chosen request once, among others that differ from repeat to repeat."""
    _, pairs = world(3)
    asked = greedy(pairs)
    few = requests.noise_requests(asked, 5)
    rows, size = requests.repeats_among_others(few, asked, 4, seed=0)
    assert size == 10 and len(rows) == 40

    fillers, orders = set(), set()
    for repeat in range(4):
        shard = rows[repeat * size : (repeat + 1) * size]
        assert {row.repeat for row in shard} == {repeat}
        assert len({row.pair.key for row in shard}) == size
        own = [row.pair.key for row in shard if not row.filler]
        assert sorted(own) == sorted(row.pair.key for row in few)
        fillers.add(frozenset(row.pair.key for row in shard if row.filler))
        orders.add(tuple(own))
    assert len(fillers) == len(orders) == 4
    # With few others each repeat still leaves some out, so that the neighbours differ.
    rows, size = requests.repeats_among_others(few, [*few, *asked[-4:]], 4, seed=0)
    assert size == 5 + 2
    assert requests.repeats_among_others(few, few, 4, seed=0)[1] == 5
    assert requests.repeats_among_others([], asked, 4, seed=0) == ([], 0)


def test_collect_answers_asks_for_both_floors_and_the_other_mode() -> None:
    _, pairs = world(2)
    asked = greedy(pairs)
    calls: list[tuple[Any, ...]] = []

    def generate(what: str, rows: list[Request], *how: Any) -> list[Row]:
        calls.append((what, len(rows), *how))
        answer = {"text": "yes", "finish": "stop", "num_tokens": 1}
        return [{"answers": [answer] * len(row.seeds)} for row in rows]

    settings = table(noise_inputs=2, noise_samples=3)
    output = requests.collect_answers(asked, settings, GenerationTable(mode="exact"), 0, generate)
    assert calls == [
        ("answers", 24, "exact", 0.0, 0),
        ("neighbours", 12, "fast", 0.0, 4),
        ("samples", 2, "exact", 0.7, 0),
    ]
    assert output.num_tokens == 24 + 12 + 6  # the fillers' answers are thrown away, their cost is not
    assert sorted(r.sample for r in output.samples) == sorted(r.sample for r in output.neighbours) == [0, 0, 1, 1, 2, 2]
    assert output.other_mode is output.neighbours
    calls.clear()
    requests.collect_answers(asked, settings, GenerationTable(), 0, generate)
    assert calls[-1] == ("exact", 2, "exact", 0.0, 0)
    calls.clear()
    output = requests.collect_answers(asked, settings, GenerationTable(engine="vllm"), 0, generate)
    assert [call[0] for call in calls] == ["answers", "neighbours", "samples"] and output.other_mode == []


def test_pairs_too_long_for_the_judge_of_agreement_do_not_agree(caplog: pytest.LogCaptureFixture) -> None:
    """They are listed and warned of, or refused with model.too_long = error."""

    class LetterCodec(WordCodec):
        max_tokens = 10**6

        def encode_prompt(self, user_text: str) -> list[int]:
            return list(user_text.encode())

        def encode_plain(self, text: str) -> list[int]:
            return list(text.encode())

    codec = LetterCodec()
    pairs = [("a", "b"), ("c" * 50, "d"), ("e", "f")]
    requests, dropped = agreement.judge_requests(pairs, codec, "error")
    assert [row["pair"] for row in requests] == [0, 0, 1, 1, 2, 2] and not dropped
    assert bytes(requests[0]["prompt_ids"]).startswith(b"Answer A: a\nAnswer B: b\n")
    assert bytes(requests[1]["prompt_ids"]).startswith(b"Answer A: b\nAnswer B: a\n")
    longest = max(len(c) for c in requests[0]["continuations"])
    codec.max_tokens = len(requests[0]["prompt_ids"]) + longest
    requests, dropped = agreement.judge_requests(pairs, codec, "drop")
    assert [row["pair"] for row in requests] == [0, 0, 2, 2]
    assert [(row["reason"], row["answers"][1]) for row in dropped] == [("too_long_for_judge", "d")]
    assert "1 of 3 pairs" in caplog.text
    scored = [{"pair": row["pair"], "logps": [-1.0, -2.0 - place]} for place, row in enumerate(requests)]
    assert agreement.read_scores(scored, 3) == [(1.0, 2.0), (), (3.0, 4.0)]
    codec.max_tokens -= 1
    with pytest.raises(UserError, match="context of the judge is"):
        agreement.judge_requests(pairs, codec, "error")
