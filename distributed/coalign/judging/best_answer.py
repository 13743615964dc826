"""The responses to one input: pooled over its wordings, with one best answer for all of them.

Used by ranking.py. Also finds the wordings under which the model answers another question. Knows no group.
"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from coalign.config import RankTable
from coalign.process import derive_seed
from coalign.records import Example, ExampleKey, Finish, Response, Verdict, Wording
from coalign.text import normalise_answer, unit_hash
from coalign.wordings.wordings import GENERATED

VerdictKey = tuple[str, str, str, Finish]  # (task, example, canonical text, finish)


@dataclasses.dataclass(frozen=True, slots=True)
class Pooled:
    """A distinct response to one input over all its wordings; `exact` says that it matches a gold answer."""

    text: str
    reward: int
    exact: bool
    finish: Finish
    count: int
    wordings: tuple[str, ...]


def pool(
    responses: Iterable[Response], verdicts: Mapping[VerdictKey, Verdict], golds: Sequence[str], rewards: str = "judge"
) -> list[Pooled]:
    """Return the distinct canonical texts of one input's responses, in order of appearance.

    A text that was once finished and once cut off is one candidate: finished, with the better of its rewards. Responses
    that have no verdict are passed over, and so is an empty text that never ended, which has no token to train on.
    """
    right = {normalise_answer(gold) for gold in golds}
    pooled: dict[str, Pooled] = {}
    for response in responses:
        text = response.canonical
        verdict = None if text is None else verdicts.get((response.task, response.example, text, response.finish))
        if text is None or verdict is None or (not text and response.finish == "length"):
            continue
        exact = normalise_answer(text) in right
        whole = bool(text) and response.finish == "stop"
        reward = verdict.reward if rewards != "exact" else (2 if exact else 1) if whole else 0
        new = Pooled(text, reward, exact, response.finish, 1, (response.wording,))
        pooled[text] = merge(pooled[text], new) if text in pooled else new
    return list(pooled.values())


def merge(a: Pooled, b: Pooled) -> Pooled:
    """Return two responses as one under the text of the first."""
    return Pooled(
        text=a.text,
        reward=max(a.reward, b.reward),
        exact=a.exact or b.exact,
        finish="stop" if "stop" in (a.finish, b.finish) else "length",
        count=a.count + b.count,
        wordings=tuple(dict.fromkeys((*a.wordings, *b.wordings))),
    )


def permute_rewards(pooled: Sequence[Pooled], seed: int) -> list[Pooled]:
    """Return the responses with their rewards permuted (a control arm).

    `exact` moves along with the reward, so that the choice of the best learns nothing from the gold answer either.
    """
    standings = [(item.reward, item.exact) for item in pooled]
    random.Random(seed).shuffle(standings)
    return [
        dataclasses.replace(item, reward=reward, exact=exact)
        for item, (reward, exact) in zip(pooled, standings, strict=True)
    ]


def preference(item: Pooled, key: ExampleKey, gold: bool) -> tuple[int, bool, int, float]:
    """Return what the best answer is smallest in: reward, exact match (`gold` only), wordings that said it, hash."""
    return -item.reward, not (gold and item.exact), -len(item.wordings), unit_hash("rank", *key, item.text)


def elect(pooled: Sequence[Pooled], key: ExampleKey) -> list[Pooled]:
    """Return the responses with reward 2 for the one that most wordings said and at most 1 for all others.

    Self-consistency (arXiv 2203.11171) over wordings: without gold answers a judge tells right from wrong far worse
    than the wordings do together. It still rules out what is of the wrong type, and decides among equals.
    """
    standing = [item for item in pooled if item.reward > 0]
    if not standing:
        return list(pooled)
    elected = min(standing, key=lambda item: (-len(item.wordings), *preference(item, key, gold=False)))
    return [dataclasses.replace(item, reward=2 if item is elected else min(item.reward, 1)) for item in pooled]


def join_gold(pooled: Sequence[Pooled], gold_text: str) -> list[Pooled]:
    """Return the responses with the gold answer among them, reward 2; a response of the same text becomes it."""
    same = next((item for item in pooled if item.text == gold_text), None)
    joined = Pooled(gold_text, 2, True, "stop", 0, ()) if same is None else same
    joined = dataclasses.replace(joined, reward=2, exact=True, finish="stop")
    return [joined, *(item for item in pooled if item.text != gold_text)]


def rank_input(
    pooled: Sequence[Pooled], example: Example, table: RankTable, gold: bool, seed: int
) -> tuple[list[Pooled], Pooled | None, bool]:
    """Return (responses of one input, the best for all its wordings, whether the gold answer joined as such).

    The best is None when no response is correct and there is no gold answer to take its place.
    """
    key = (example.task, example.id)
    ranked = elect(pooled, key) if not gold and table.without_gold == "agreement" else list(pooled)
    if table.rewards == "permuted":
        ranked = permute_rewards(ranked, derive_seed(seed, "rank", "permuted", *key))
    if table.rewards == "gold":
        ranked = []
    joined = not any(item.reward == 2 for item in ranked)
    if joined:
        if not gold:
            return ranked, None, False
        ranked = join_gold(ranked, example.outputs[0].strip())
        return ranked, ranked[0], True
    return ranked, min(ranked, key=lambda item: preference(item, key, gold)), False


def find_astray(
    by_input: Mapping[ExampleKey, Sequence[Response]],
    right: Mapping[ExampleKey, Collection[str]],
    wordings: Mapping[tuple[str, str], Wording],
    least: float,
) -> dict[tuple[str, str], float]:
    """Return {(task, wording): share} of the generated wordings that seem to ask for something else.

    `right` holds the texts of reward 2 of each input; inputs without one don't count. A wording's share is that of its
    responses that are right; it's astray when its share is below `least` times that of its task. A model that was
    trained on a wording, and goes on giving other answers under it than under the rest, reads another question in it.
    """
    hits: dict[tuple[str, str], list[bool]] = defaultdict(list)
    of_task: dict[str, list[bool]] = defaultdict(list)
    for key, texts in right.items():
        for response in by_input[key] if texts else ():
            hit = response.canonical in texts
            hits[response.task, response.wording].append(hit)
            of_task[response.task].append(hit)
    share = {key: sum(found) / len(found) for key, found in hits.items()}
    mean = {task: sum(found) / len(found) for task, found in of_task.items()}
    return {
        key: share[key]
        for key in sorted(share)
        if wordings[key].source == GENERATED and share[key] < least * mean[key[0]]
    }
