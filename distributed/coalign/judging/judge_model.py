"""The judge as a function from prompts to log-odds: each distinct prompt is scored once, however many answers share it.

Knows no model: it is given a codec and a function that scores requests.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence

from coalign.judging.verdicts import AnyAnswer, PromptsByQuestion
from coalign.prompts import NO, YES
from coalign.records import Row
from coalign.wordings.asking import PromptCodec, fits

# (requests {"key", "prompt_ids", "continuations"}, name of their shards) -> the same rows with "key" and "logps"
Score = Callable[[list[Row], str], Iterable[Row]]


class JudgeModel:
    """Asks a model yes-or-no questions: `ask` scores prompts, `log_odds` returns what was found.

    log-odds = log P(yes | prompt) - log P(no | prompt), of whole strings, in nats.
    """

    def __init__(self, codec: PromptCodec, too_long: str, score: Score) -> None:
        self.codec, self.too_long, self.score = codec, too_long, score
        self.continuations = [codec.encode_plain(YES), codec.encode_plain(NO)]
        self._key_of: dict[str, str | None] = {}  # prompt -> key of its token ids, None when it exceeds the context
        self._requested: set[str] = set()  # keys
        self._log_odds: dict[str, float] = {}  # key -> log-odds

    @property
    def num_scored(self) -> int:
        """Return how many distinct prompts have been scored."""
        return len(self._log_odds)

    def ask(self, asked: Iterable[tuple[AnyAnswer, PromptsByQuestion]], name: str) -> None:
        """Score every prompt about these answers that has not been scored yet; `name` names their shards.

        Raises UserError when a prompt exceeds the context of the judge and `too_long` is "error".
        """
        requests = [row for answer, by_question in asked for row in self._new_requests(answer, by_question)]
        for row in self.score(requests, name):
            self._log_odds[row["key"]] = row["logps"][0] - row["logps"][1]

    def log_odds(self, prompt: str) -> float | None:
        """Return the log-odds of a prompt that was asked about, in nats; None for one that exceeds the context."""
        key = self._key_of[prompt]
        return None if key is None else self._log_odds[key]

    def _new_requests(self, answer: AnyAnswer, by_question: PromptsByQuestion) -> list[Row]:
        longest = max(map(len, self.continuations))
        where = f"task {answer.task!r}, example {answer.example!r}: the judge's prompt"
        requests: list[Row] = []
        for prompt in all_prompts(by_question):
            if prompt in self._key_of:
                continue
            ids = self.codec.encode_prompt(prompt)
            num_tokens = len(ids) + longest
            if not fits(num_tokens, self.codec.max_tokens, self.too_long, where, "leave such responses out", "judge"):
                self._key_of[prompt] = None
                continue
            key = self._key_of[prompt] = _key(ids)
            if key not in self._requested:
                self._requested.add(key)
                requests.append({"key": key, "prompt_ids": ids, "continuations": self.continuations})
        return requests


def _key(ids: Sequence[int]) -> str:
    return hashlib.blake2b(json.dumps(ids).encode(), digest_size=16).hexdigest()


def all_prompts(by_question: PromptsByQuestion) -> Iterable[str]:
    """Return the prompts of all questions about one answer."""
    return itertools.chain.from_iterable(by_question.values())
