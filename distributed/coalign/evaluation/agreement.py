"""Whether two answers mean the same, by a judge: the questions, and what it said.

Used by launch/eval.py. Pure text; knows no model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from coalign.errors import UserError
from coalign.prompts import NO, YES, same_answer_question

logger = logging.getLogger("coalign")


class PromptCodec(Protocol):
    """What is asked of encoding.Codec here."""

    max_tokens: int

    def encode_prompt(self, user_text: str) -> list[int]:
        """Return the token ids of a user message."""

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text alone."""


def judge_requests(
    pairs: Sequence[tuple[str, str]], codec: PromptCodec, too_long: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a request to score yes and no after the question whether two answers mean the same, a pair each.

    A pair whose prompt exceeds the judge's context gets none but a row in the second list, and counts as not agreeing;
    UserError when `too_long` is "error".
    """
    verdicts = [codec.encode_plain(YES), codec.encode_plain(NO)]
    room = codec.max_tokens - max(map(len, verdicts))
    requests: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    for index, pair in enumerate(pairs):
        ids = codec.encode_prompt(same_answer_question(*pair))
        if len(ids) <= room:
            requests.append({"pair": index, "prompt_ids": ids, "continuations": verdicts})
        elif too_long == "error":
            raise UserError(
                f"eval.agreement: the question whether {pair[0][:40]!r} and {pair[1][:40]!r} mean the same has"
                f" {len(ids)} tokens, which exceed the judge's context of {codec.max_tokens}; set"
                ' model.too_long="drop" to count such pairs as not agreeing, or use a judge with a longer context'
            )
        else:
            dropped.append({"reason": "too_long_for_judge", "answers": list(pair), "num_tokens": len(ids)})
    if dropped:
        logger.warning(
            "%d of %d pairs of answers exceed the context of the judge of agreement (%d tokens) and count as not"
            " agreeing",
            len(dropped),
            len(pairs),
            codec.max_tokens,
        )
    return requests, dropped


def read_agreement(rows: Iterable[dict[str, Any]], num_pairs: int) -> list[bool]:
    """Return for each pair whether yes scored above no; a pair that was not asked about does not agree."""
    agreeing = {row["pair"] for row in rows if row["logps"][0] > row["logps"][1]}
    return [index in agreeing for index in range(num_pairs)]
