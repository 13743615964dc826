"""The distinct responses to one input over all its wordings, and the one that is best for all of them.

Also finds the wordings under which the model answers another question. Knows no group.
"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from coalign.config import RankTable
from coalign.process import derive_seed
from coalign.records import Candidate, Example, ExampleKey, Finish, Response, Verdict, Wording
from coalign.text import normalise_answer, unit_hash
from coalign.wordings.wordings import GENERATED

VerdictKey = tuple[str, str, str, Finish]  # (task, example, canonical text, finish)


@dataclasses.dataclass(frozen=True, slots=True)
class RankRules:
    """How responses are ranked: [rank], whether gold answers may be looked at (judge.gold), and the run's seed."""

    table: RankTable
    gold: bool
    seed: int


def rank_responses(
    responses: Iterable[Response], verdicts: Mapping[VerdictKey, Verdict], example: Example, rules: RankRules
) -> tuple[list[Candidate], bool]:
    """Return the candidates of one input with the best one marked, and whether the gold answer joined as such.

    No candidate is marked when no response is correct and there is no gold answer to take its place.
    """
    golds = example.outputs if rules.gold else ()
    return rank_candidates(distinct_candidates(responses, verdicts, golds, rules.table.rewards), example, rules)


def distinct_candidates(
    responses: Iterable[Response], verdicts: Mapping[VerdictKey, Verdict], golds: Sequence[str], rewards: str = "judge"
) -> list[Candidate]:
    """Return the distinct canonical texts of one input's responses, in order of appearance.

    A text that was once finished and once cut off is one candidate: finished, with the better of its rewards. Left out
    are responses without a verdict, and an empty text that never ended, which has no token to train on.
    """
    right = {normalise_answer(gold) for gold in golds}
    found: dict[str, Candidate] = {}
    for response in responses:
        text = response.canonical
        verdict = None if text is None else verdicts.get((response.task, response.example, text, response.finish))
        if text is None or verdict is None or (not text and response.finish == "length"):
            continue
        whole = bool(text) and response.finish == "stop"
        exact_reward = (2 if normalise_answer(text) in right else 1) if whole else 0
        reward = exact_reward if rewards == "exact" else verdict.reward
        new = Candidate(text, reward, response.finish, 1, (response.wording,))
        found[text] = merge(found[text], new) if text in found else new
    return list(found.values())


def merge(a: Candidate, b: Candidate) -> Candidate:
    """Return two candidates as one under the text of the first."""
    return Candidate(
        text=a.text,
        reward=max(a.reward, b.reward),
        finish="stop" if "stop" in (a.finish, b.finish) else "length",
        count=a.count + b.count,
        wordings=tuple(dict.fromkeys((*a.wordings, *b.wordings))),
        best=a.best or b.best,
    )


def rank_candidates(
    candidates: Sequence[Candidate], example: Example, rules: RankRules
) -> tuple[list[Candidate], bool]:
    """Return the candidates with their final rewards and the best one marked; see `rank_responses`."""
    table, key = rules.table, (example.task, example.id)
    golds = {normalise_answer(text) for text in example.outputs} if rules.gold else set()
    exact = {item.text for item in candidates if normalise_answer(item.text) in golds}
    ranked = elect(candidates, key) if not rules.gold and table.without_gold == "agreement" else list(candidates)
    if table.rewards == "permuted":
        ranked, exact = permute_rewards(ranked, exact, derive_seed(rules.seed, "rank", "permuted", *key))
    if table.rewards == "gold":
        ranked = []
    if any(item.reward == 2 for item in ranked):
        best = min(ranked, key=lambda item: preference(item, key, exact))
        return [dataclasses.replace(item, best=item is best) for item in ranked], False
    if rules.gold:
        return join_gold(ranked, example.outputs[0].strip()), True
    return ranked, False


def best_of(candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the candidate that is marked as best, None when there is none."""
    return next((item for item in candidates if item.best), None)


def preference(item: Candidate, key: ExampleKey, exact: Collection[str] = ()) -> tuple[int, bool, int, float]:
    """Return what the best answer is smallest in: reward, text among `exact`, number of wordings, hash."""
    return -item.reward, item.text not in exact, -len(item.wordings), unit_hash("rank", *key, item.text)


def elect(candidates: Sequence[Candidate], key: ExampleKey) -> list[Candidate]:
    """Return the candidates with reward 2 for the one that most wordings said and at most 1 for all others.

    Self-consistency (arXiv 2203.11171) over wordings: without gold answers the majority of the wordings recognises a
    correct answer far better than a judge does. The judge still excludes the wrong type, and decides among equals.
    """
    electable = [item for item in candidates if item.reward > 0]
    if not electable:
        return list(candidates)
    elected = min(electable, key=lambda item: (-len(item.wordings), *preference(item, key)))
    return [dataclasses.replace(item, reward=2 if item is elected else min(item.reward, 1)) for item in candidates]


def permute_rewards(
    candidates: Sequence[Candidate], exact: Collection[str], seed: int
) -> tuple[list[Candidate], set[str]]:
    """Return the candidates with their rewards permuted (a control arm), and the texts that now count as exact.

    An exact match moves along with its reward, so that the choice of the best learns nothing from the gold answer.
    """
    givers = list(candidates)
    random.Random(seed).shuffle(givers)
    pairs = list(zip(candidates, givers, strict=True))
    permuted = [dataclasses.replace(item, reward=giver.reward) for item, giver in pairs]
    return permuted, {item.text for item, giver in pairs if giver.text in exact}


def join_gold(candidates: Sequence[Candidate], gold_text: str) -> list[Candidate]:
    """Return the candidates with the gold answer first, as the best, with reward 2; one of the same text becomes it."""
    same = next((item for item in candidates if item.text == gold_text), None)
    joined = same or Candidate(gold_text, 2, "stop", 0, ())
    joined = dataclasses.replace(joined, reward=2, finish="stop", best=True)
    return [joined, *(item for item in candidates if item.text != gold_text)]


def find_astray(
    by_input: Mapping[ExampleKey, Sequence[Response]],
    right: Mapping[ExampleKey, Collection[str]],
    wordings: Mapping[tuple[str, str], Wording],
    least: float,
) -> dict[tuple[str, str], float]:
    """Return {(task, wording): share} of the generated wordings that seem to ask for something else.

    `right` holds the texts of reward 2 of each input; inputs without one don't count. A wording's share is that of its
    responses that are right. It is astray when its share is below `least` times that of its task: a model that was
    trained on the wording and still answers differently under it reads another question in it.
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
