"""Inputs under wordings to requests and back to responses, and what happens to a text that exceeds the context."""

from __future__ import annotations

import logging

import pytest

from coalign.errors import UserError
from coalign.records import Example, Wording
from coalign.wordings.asking import Pair, Request, build_requests, check_lengths, draw_pairs, fits, read_responses
from unit.worlds import WordCodec, world

TEMPLATE = Wording("x", "t", "{a}?", "template", r"(?P<a>\d+)$", {"yes": "true"})


def test_every_input_is_drawn_under_wordings_that_can_ask_about_it() -> None:
    """Wordings are taken in hash order, so each input has its own; one that cannot ask is listed with its reason."""
    wordings = [Wording(f"w{i}", "t", f"Ask {i}") for i in range(6)]
    examples = [Example(f"e{i}", "t", f"input {i}", ("yes",), "align") for i in range(20)]
    pairs, dropped = draw_pairs(examples, {"t": [*wordings, TEMPLATE]}, 2, seed=0)
    assert [pair.example.id for pair in pairs] == [e.id for e in examples for _ in range(2)]
    assert {pair.wording.id for pair in pairs} == {w.id for w in wordings}
    assert all(pair.prompt == f"{pair.wording.text}\n\n{pair.example.input}" for pair in pairs)
    assert {(row["wording"], row["reason"]) for row in dropped} == {("x", "wording_does_not_fit")}
    assert len(dropped) == len(examples)
    assert draw_pairs(examples, {"t": wordings}, 2, seed=1)[0] != pairs
    assert draw_pairs(examples, {}, 2, seed=0) == ([], [])


def test_responses_are_mapped_back_and_numbered_by_request() -> None:
    example = Example("fits", "t", "12", ("yes",), "test")
    request = Request(Pair(example, TEMPLATE, "12?"), [1, 2], [7, 8], repeat=3)
    answers = [{"text": text, "finish": "stop", "num_tokens": 2} for text in ("True", "maybe")]
    filler = Request(request.pair, [1], [7], filler=True)
    found = read_responses([request, filler], [{"answers": answers}, {"answers": answers[:1]}])
    assert [(r.text, r.canonical, r.sample) for r in found] == [("True", "yes", 3), ("maybe", "maybe", 4)]
    place = {"task": "t", "example": "fits", "wording": "x", "repeat": 3}
    assert request.to_row() == place | {"prompt_ids": [1, 2], "seeds": [7, 8]}
    with pytest.raises(ValueError, match=r"shorter|longer"):
        read_responses([request], [])


def test_long_prompts_are_counted_or_refused() -> None:
    _, pairs = world(1)  # prompts of 7 words
    requests, too_long = build_requests(pairs, WordCodec(), "drop", 1, lambda _: [0])
    assert (len(requests), len(too_long)) == (12, 0)
    requests, too_long = build_requests(pairs, WordCodec(), "drop", 2, lambda _: [0])
    assert not requests and [pair for pair, _ in too_long] == pairs and {length for _, length in too_long} == {7}
    with pytest.raises(UserError, match="context of 8"):
        build_requests(pairs, WordCodec(), "error", 2, lambda _: [0])


def test_lengths_are_dropped_or_refused_never_cut(caplog: pytest.LogCaptureFixture) -> None:
    """The policy drop returns the long rows and says how many; the policy error names the longest."""
    rows = [("a", 10), ("b", 11), ("c", 30), ("d", 2)]
    with caplog.at_level(logging.WARNING, "coalign"):
        assert check_lengths(rows, 10, "drop") == {"b", "c"}
    assert "2 rows dropped" in caplog.text and "c with 30" in caplog.text
    with pytest.raises(UserError, match=r"2 rows .* 10 tokens, the longest is c with 30"):
        check_lengths(rows, 10, "error")
    assert check_lengths(rows, 30, "error") == set()
    assert fits(10, 10, "error", "a") and not fits(11, 10, "drop", "b")
    with pytest.raises(UserError, match=r"b takes 11 tokens, and the context of the judge is 10; .*too_long=\"drop\""):
        fits(11, 10, "error", "b", model="judge")
