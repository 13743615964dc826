"""Whether two answers mean the same, by a judge: the questions, and what it said.

Pure text; knows no model.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from coalign.errors import UserError
from coalign.evaluation.metrics import Decide, rouge_l_agrees
from coalign.prompts import NO, YES, same_answer_question
from coalign.wordings.asking import PromptCodec, fits

_ROUGE_L = re.compile(r"rouge_l\s*>=\s*(\S+)")

logger = logging.getLogger("coalign")


def judge_requests(
    pairs: Sequence[tuple[str, str]], codec: PromptCodec, too_long: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a request per pair: score yes and no after the question whether two answers mean the same.

    A pair whose prompt exceeds the judge's context gets none but a row in the second list, and counts as not agreeing;
    UserError when `too_long` is "error".
    """
    verdicts = [codec.encode_plain(YES), codec.encode_plain(NO)]
    longest = max(map(len, verdicts))
    requests: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    for index, pair in enumerate(pairs):
        ids = codec.encode_prompt(same_answer_question(*pair))
        what = f"eval.agreement: the question whether {pair[0][:40]!r} and {pair[1][:40]!r} mean the same"
        if fits(len(ids) + longest, codec.max_tokens, too_long, what, "count such pairs as not agreeing", "judge"):
            requests.append({"pair": index, "prompt_ids": ids, "continuations": verdicts})
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


@dataclasses.dataclass(frozen=True, slots=True)
class Agreement:
    """When two answers count as the same, beside having the same normal form."""

    kind: Literal["exact", "rouge_l", "judge"]
    threshold: float = 1.0
    folder: str = ""

    def decider(self, ask_judge: Decide) -> Decide | None:
        """Return the function that decides which pairs of different answers agree; None where only equal ones do."""
        if self.kind == "exact":
            return None
        return ask_judge if self.kind == "judge" else functools.partial(rouge_l_agrees, threshold=self.threshold)


def parse_agreement(text: str) -> Agreement:
    """Read eval.agreement: `exact`, `rouge_l>=X` with 0 < X <= 1, else a folder. Raises UserError for a bad X."""
    if text.strip() == "exact":
        return Agreement("exact")
    if not text.strip().startswith("rouge_l"):
        return Agreement("judge", folder=text)
    match = _ROUGE_L.fullmatch(text.strip())
    try:
        threshold = float(match[1]) if match else -1.0
    except ValueError:
        threshold = -1.0
    if not 0.0 < threshold <= 1.0:
        raise UserError(f"eval.agreement={text!r}: a threshold over 0 and up to 1 was expected; use rouge_l>=0.7")
    return Agreement("rouge_l", threshold=threshold)
