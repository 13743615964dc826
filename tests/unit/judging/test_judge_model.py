"""The judge as a function from prompts to log-odds: each distinct prompt once, long ones left out or refused."""

from __future__ import annotations

import pytest

from coalign.errors import UserError
from coalign.judging.judge_model import JudgeModel
from coalign.judging.verdicts import DistinctAnswer, PromptsByQuestion
from coalign.prompts import NO, YES
from coalign.records import Row


class LetterCodec:
    """Encodes a text as the codes of its letters in lower case."""

    max_tokens = 5 + max(len(YES), len(NO))

    def encode_prompt(self, user_text: str) -> list[int]:
        return [ord(letter) for letter in user_text.lower()]

    encode_request = encode_plain = encode_prompt


class Scores:
    """Scores a request by its first letter, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[list[int]]]] = []

    def __call__(self, requests: list[Row], name: str) -> list[Row]:
        self.asked.append((name, [row["prompt_ids"] for row in requests]))
        codec = LetterCodec()
        assert all(row["continuations"] == [codec.encode_plain(YES), codec.encode_plain(NO)] for row in requests)
        return [{"key": row["key"], "logps": [float(row["prompt_ids"][0]), 1.0]} for row in requests]


def about(*prompts: str) -> tuple[DistinctAnswer, PromptsByQuestion]:
    """Return an answer with prompts of one question."""
    return DistinctAnswer("mood", "e2", "fine", "stop"), {"correct": prompts}


def test_each_prompt_is_scored_once_over_several_calls() -> None:
    """Prompts with the same token ids count as one; what was scored for known answers is not scored again."""
    scores = Scores()
    judge = JudgeModel(LetterCodec(), "drop", scores)
    judge.ask([about("aa", "AA", "b"), about("aa", "toolong")], "known")
    assert scores.asked == [("known", [[97, 97], [98]])]
    assert judge.log_odds("aa") == judge.log_odds("AA") == 96.0
    assert judge.log_odds("toolong") is None
    judge.ask([about("B", "abc", "abcdef")], "responses")
    assert scores.asked[1] == ("responses", [[97, 98, 99]])
    assert (judge.log_odds("B"), judge.log_odds("abcdef"), judge.num_scored) == (97.0, None, 3)


def test_a_long_prompt_is_refused_before_anything_is_scored() -> None:
    scores = Scores()
    with pytest.raises(UserError, match="task 'mood', example 'e2': the judge's prompt takes 9 tokens"):
        JudgeModel(LetterCodec(), "error", scores).ask([about("a"), about("abcdef")], "known")
    assert not scores.asked
