"""Inputs under wordings as requests to a model, and what it generates as responses: for sample and eval alike.

Also the one home of model.too_long: a text that exceeds a model's context is dropped or refused, and never cut. Pure
texts and token ids. Knows no model.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from coalign.errors import UserError
from coalign.records import Example, Response, Row, Wording
from coalign.text import unit_hash
from coalign.wordings.wordings import canonical_answer, misfit, render_prompt

logger = logging.getLogger("coalign")

MAX_ANSWERS = 20_000_000  # of a step: at 1,000 a second six hours, at about a kilobyte each the memory of a large node


class PromptCodec(Protocol):
    """The part of models.codec.Codec that builds requests."""

    max_tokens: int

    def encode_prompt(self, user_text: str) -> list[int]:
        """Return the token ids of a user message in the chat template."""

    def encode_request(self, user_text: str) -> list[int]:
        """Return the token ids of a user message that sampling continues, where a thought may come first."""

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text without any template."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One input under one wording, with the user message that asks for it."""

    example: Example
    wording: Wording
    prompt: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Return (task, example, wording)."""
        return self.example.task, self.example.id, self.wording.id


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What a worker is asked about a pair: one answer per seed.

    `repeat` numbers the requests of one pair. A `filler` is computed beside others, and its answers are not read.
    """

    pair: Pair
    prompt_ids: list[int]
    seeds: list[int]
    repeat: int = 0
    filler: bool = False

    def to_row(self) -> Row:
        """Return what is sent to a worker, whose result repeats everything but the prompt and the seeds."""
        task, example, wording = self.pair.key
        where = {"task": task, "example": example, "wording": wording, "repeat": self.repeat}
        return where | {"prompt_ids": self.prompt_ids, "seeds": self.seeds}


# From inputs to requests and back


def draw_pairs(
    examples: Iterable[Example], wordings: Mapping[str, Sequence[Wording]], wordings_per_input: int, seed: int
) -> tuple[list[Pair], list[Row]]:
    """Return every input under the first of its task's wordings in hash order, and a row per wording left out.

    A wording is left out where its template does not match the input or its answer map gives no distinct words on it.
    Gold answers are not read, so that the inputs may be unlabelled. Rows are {reason, task, example, wording}.
    """
    pairs: list[Pair] = []
    dropped: list[Row] = []
    for example in examples:
        order = sorted(wordings.get(example.task, []), key=lambda w: unit_hash(str(seed), example.id, w.id))
        reasons = {wording.id: misfit(wording, example.input) for wording in order}
        where = {"task": example.task, "example": example.id}
        dropped += [{"reason": reasons[w.id], **where, "wording": w.id} for w in order if reasons[w.id]]
        fitting = [wording for wording in order if not reasons[wording.id]]
        for wording in fitting[:wordings_per_input]:
            pairs.append(Pair(example, wording, render_prompt(wording, example.input) or ""))
    return pairs, dropped


def require_end(num_answers: int, keys: str) -> None:
    """Raise UserError for so many answers that generating them would not end; `keys` are the settings that ask."""
    if num_answers > MAX_ANSWERS:
        raise UserError(
            f"{keys} ask for {num_answers:,} answers, which would not end; at most {MAX_ANSWERS:,} are made"
        )


def build_requests(
    pairs: Sequence[Pair],
    codec: PromptCodec,
    too_long: str,
    max_new_tokens: int,
    seeds_of: Callable[[Pair], list[int]],
) -> tuple[list[Request], list[tuple[Pair, int]]]:
    """Return a request per pair that fits the context, and the others with the number of tokens of their prompts.

    Raises UserError when one does not fit and `too_long` is "error".
    """
    requests = [Request(pair, codec.encode_request(pair.prompt), seeds_of(pair)) for pair in pairs]
    names = ["input {1} of {0} under wording {2}".format(*request.pair.key) for request in requests]
    lengths = [(name, len(r.prompt_ids) + max_new_tokens) for name, r in zip(names, requests, strict=True)]
    left_out = check_lengths(lengths, codec.max_tokens, too_long)
    named = list(zip(names, requests, strict=True))
    fitting = [request for name, request in named if name not in left_out]
    return fitting, [(request.pair, len(request.prompt_ids)) for name, request in named if name in left_out]


def read_responses(requests: Iterable[Request], rows: Iterable[Row]) -> list[Response]:
    """Return the responses in a worker's rows, mapped back by the wording; rows are in the order of the requests.

    `sample` counts the seeds from the request's `repeat`.
    """
    responses = []
    for request, row in zip(requests, rows, strict=True):
        if request.filler:
            continue
        example, wording = request.pair.example, request.pair.wording
        for index, answer in enumerate(row["answers"]):
            text = answer["text"]
            same = canonical_answer(wording, example.input, text)
            place = (example.id, example.task, wording.id, request.repeat + index)
            responses.append(Response(*place, text, same, answer["finish"], answer["num_tokens"]))
    return responses


# What exceeds the context: model.too_long


def fits(
    num_tokens: int,
    max_tokens: int,
    policy: str,
    what: str,
    otherwise: str = "leave such rows out",
    model: str = "model",
) -> bool:
    """Return whether a text of `num_tokens` fits a context of `max_tokens`.

    Raises UserError when it does not and the policy, model.too_long, is "error". `what` names the text and `otherwise`
    says what "drop" does with it; `model` is whose context it is.
    """
    if num_tokens <= max_tokens:
        return True
    if policy == "error":
        raise UserError(
            f"{what} takes {num_tokens} tokens, and the context of the {model} is {max_tokens}; set"
            f' model.too_long="drop" to {otherwise}, or use a {model} with a longer context'
        )
    return False


def require_requests(requests: Collection[object], dropped: Iterable[Row], what: str, key: str) -> None:
    """Raise UserError when nothing is left to ask; it counts the reasons and names the key that takes up room."""
    if requests:
        return
    reasons = Counter(str(row.get("reason")) for row in dropped)
    counted = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())) or "none was made"
    advice = (
        f"lower {key}" if set(reasons) == {"too_long"} else f"check the wordings, and lower {key} if it is too high"
    )
    raise UserError(f"no {what} is left to ask (left out: {counted}); {advice}")


def check_lengths(lengths: Iterable[tuple[str, int]], max_tokens: int, policy: str) -> set[str]:
    """Return the names whose length in tokens exceeds the context, and log how many there are.

    Raises UserError that names the longest when the policy, model.too_long, is "error".
    """
    too_long = {name: length for name, length in lengths if length > max_tokens}
    if not too_long:
        return set()
    name, length = max(too_long.items(), key=lambda item: item[1])
    if policy == "error":
        raise UserError(
            f"{len(too_long)} rows are longer than the context of {max_tokens} tokens, the longest is {name} with"
            f' {length}; set model.too_long="drop" to leave them out, or use a model with a longer context'
        )
    logger.warning(
        "%d rows dropped: longer than the context of %d tokens (longest: %s with %d)",
        len(too_long),
        max_tokens,
        name,
        length,
    )
    return {*too_long}
