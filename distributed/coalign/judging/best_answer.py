"""The distinct responses to one input over all its wordings, and the one that is best for all of them.

Also finds the wordings under which the model answers another question. Knows no group.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from coalign.config import RankTable
from coalign.process import derive_seed
from coalign.records import Candidate, Example, ExampleKey, Finish, Response, Verdict, Wording
from coalign.text import AnswerForm, normalise_answer, unit_hash
from coalign.wordings.wordings import GENERATED

VerdictKey = tuple[str, str, str, Finish]  # (task, example, canonical text, finish)


@dataclasses.dataclass(frozen=True, slots=True)
class RankRules:
    """How responses are ranked: [rank], whether gold answers may be looked at (judge.gold), and the run's seed.

    `forms` holds what counts when answers are compared, by task; a task that it lacks has none of it.
    """

    table: RankTable
    gold: bool
    seed: int
    forms: Mapping[str, AnswerForm] = dataclasses.field(default_factory=dict)


def rank_responses(
    responses: Iterable[Response], verdicts: Mapping[VerdictKey, Verdict], example: Example, rules: RankRules
) -> tuple[list[Candidate], bool]:
    """Return the candidates of one input with the best one marked, and whether the gold answer joined as such.

    No candidate is marked when no response is correct and there is no gold answer to take its place.
    """
    golds, form = example.outputs if rules.gold else (), rules.forms.get(example.task, ())
    found = distinct_candidates(responses, verdicts, golds, rules.table.rewards, form)
    return rank_candidates(found if rules.gold else pool_spellings(found, form), example, rules)


def distinct_candidates(
    responses: Iterable[Response],
    verdicts: Mapping[VerdictKey, Verdict],
    golds: Sequence[str],
    rewards: str = "judge",
    form: AnswerForm = (),
) -> list[Candidate]:
    """Return the distinct canonical texts of one input's responses, in order of appearance.

    A text that was once finished and once cut off is one candidate: finished, with the better of its rewards. Left out
    are responses without a verdict, and an empty text that never ended, which has no token to train on.
    """
    right = {normalise_answer(gold, form) for gold in golds}
    found: dict[str, Candidate] = {}
    for response in responses:
        text = response.canonical
        verdict = None if text is None else verdicts.get((response.task, response.example, text, response.finish))
        if text is None or verdict is None or (not text and response.finish == "length"):
            continue
        whole = bool(text) and response.finish == "stop"
        exact_reward = (2 if normalise_answer(text, form) in right else 1) if whole else 0
        reward = exact_reward if rewards == "exact" else verdict.reward
        new = Candidate(text, reward, response.finish, 1, (response.wording,))
        found[text] = merge(found[text], new) if text in found else new
    return list(found.values())


def pool_spellings(candidates: Sequence[Candidate], form: AnswerForm = ()) -> list[Candidate]:
    """Return the candidates with one for all spellings of an answer, in its most frequent one, for a vote.

    Of spellings that are equally frequent the one that more wordings said is shown, then the first in the alphabet.
    """
    spellings: dict[str, list[Candidate]] = defaultdict(list)
    for item in candidates:
        spellings[normalise_answer(item.text, form)].append(item)
    pooled = []
    for found in spellings.values():
        shown = min(found, key=lambda item: (-item.count, -len(item.wordings), item.text))
        pooled.append(functools.reduce(merge, [shown, *(item for item in found if item is not shown)]))
    return pooled


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
    form = rules.forms.get(example.task, ())
    golds = {normalise_answer(text, form) for text in example.outputs} if rules.gold else set()
    exact = {item.text for item in candidates if normalise_answer(item.text, form) in golds}
    ranked = elect(candidates, key, form) if not rules.gold and table.without_gold == "agreement" else list(candidates)
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


def elect(candidates: Sequence[Candidate], key: ExampleKey, form: AnswerForm = ()) -> list[Candidate]:
    """Return the candidates, spellings pooled, with reward 2 for the one that most wordings said, at most 1 for others.

    Self-consistency (arXiv 2203.11171) over wordings: without gold answers the majority of the wordings recognises a
    correct answer far better than a judge does. The judge still excludes the wrong type, and decides among equals.
    """
    candidates = pool_spellings(candidates, form)
    electable = [item for item in candidates if item.reward > 0]
    if not electable:
        return candidates
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
    rules: RankRules,
) -> dict[tuple[str, str], float]:
    """Return {(task, wording): share} of the generated wordings that seem to ask for something else.

    `right` holds the texts of reward 2 of each input; inputs without one don't count. A wording's share is that of its
    responses that are right; without gold a spelling of a right text is right too. It is astray when its share is below
    rank.min_wording_agreement times that of its task: a model that was
    trained on the wording and still answers differently under it reads another question in it.
    """
    hits: dict[tuple[str, str], list[bool]] = defaultdict(list)
    of_task: dict[str, list[bool]] = defaultdict(list)
    least = rules.table.min_wording_agreement
    for key, texts in right.items():
        form = rules.forms.get(key[0], ())
        pooled = set() if rules.gold else {normalise_answer(text, form) for text in texts}
        for response in by_input[key] if texts else ():
            said = response.canonical
            hit = said in texts or (said is not None and normalise_answer(said, form) in pooled)
            hits[response.task, response.wording].append(hit)
            of_task[response.task].append(hit)
    share = {key: sum(found) / len(found) for key, found in hits.items()}
    mean = {task: sum(found) / len(found) for task, found in of_task.items()}
    return {
        key: share[key]
        for key in sorted(share)
        if wordings[key].source == GENERATED and share[key] < least * mean[key[0]]
    }
