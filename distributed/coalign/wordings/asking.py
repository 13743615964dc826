"""Inputs under wordings as requests, and responses back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from coalign.errors import UserError
from coalign.records import Example, Response, Wording
from coalign.wordings.wordings import canonical_answer


class PromptCodec(Protocol):
    """What is asked of encoding.Codec here."""

    max_tokens: int

    def encode_prompt(self, user_text: str) -> list[int]:
        """Return the token ids of a user message."""

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text alone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One held-out input under one wording."""

    example: Example
    wording: Wording
    prompt: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Return (task, example, wording)."""
        return self.example.task, self.example.id, self.wording.id


def build_requests(
    pairs: Sequence[Pair], codec: PromptCodec, too_long: str, max_new_tokens: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a greedy request for each pair that fits the model's context, and the rows that don't.

    Raises UserError for the first one that doesn't fit when `too_long` is "error".
    """
    requests: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    for pair in pairs:
        task, example, wording = pair.key
        ids = codec.encode_prompt(pair.prompt)
        where = {"task": task, "example": example, "wording": wording}
        if len(ids) + max_new_tokens <= codec.max_tokens:
            requests.append({**where, "repeat": 0, "prompt_ids": ids, "seeds": [0]})
        elif too_long == "error":
            raise UserError(
                f"input {example} of {task} under wording {wording}: a prompt of {len(ids)} tokens and"
                f" eval.max_new_tokens={max_new_tokens} exceed the context of {codec.max_tokens}; set"
                ' model.too_long="drop" to leave such rows out, or use a model with a longer context'
            )
        else:
            dropped.append({"reason": "too_long", **where, "num_tokens": len(ids)})
    return requests, dropped


def read_responses(rows: Iterable[dict[str, Any]], pairs: dict[tuple[str, str, str], Pair]) -> list[Response]:
    """Return the responses of generated rows, mapped back through their wording; `sample` numbers the repeats."""
    responses = []
    for row in rows:
        pair = pairs[row["task"], row["example"], row["wording"]]
        for index, answer in enumerate(row["answers"]):
            responses.append(
                Response(
                    example=row["example"],
                    task=row["task"],
                    wording=row["wording"],
                    sample=row["repeat"] + index,
                    text=answer["text"],
                    canonical=canonical_answer(pair.wording, pair.example.input, answer["text"]),
                    finish=answer["finish"],
                    num_tokens=answer["num_tokens"],
                )
            )
    return responses
