"""Verdicts to groups: one wording as prompt, the distinct responses to an input ranked under it.

Takes the candidates that best_answer has ranked and writes each as the group's wording asks for it. Knows no model and
no tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coalign.config import RankTable
from coalign.errors import UserError
from coalign.judging.best_answer import RankRules, VerdictKey, best_of, find_astray, merge, rank_responses
from coalign.records import ASTRAY, Candidate, Example, ExampleKey, Group, Response, Row, Verdict, Wording
from coalign.text import AnswerForm, normalise_answer, unit_hash
from coalign.wordings.wordings import canonical_answer, expected_answer, render_prompt

ResponsesByInput = dict[ExampleKey, list[Response]]
Verdicts = Mapping[VerdictKey, Verdict]


@dataclasses.dataclass(slots=True)
class InputGroups:
    """What one input comes to: its groups, and rows of what was dropped with a reason.

    `gold_joined` says that the gold answer took the place of a correct response. `num_foreign` counts the candidates
    that could not be written under a group's wording, `num_losers` those that are words of another wording.
    """

    groups: list[Group] = dataclasses.field(default_factory=list)
    dropped: list[Row] = dataclasses.field(default_factory=list)
    gold_joined: bool = False
    num_foreign: int = 0
    num_losers: int = 0


# From all responses to groups


def make_groups(
    responses: Iterable[Response],
    verdicts: Iterable[Verdict],
    examples: Mapping[ExampleKey, Example],
    wordings: Mapping[tuple[str, str], Wording],
    rules: RankRules,
) -> tuple[list[Group], list[Row], dict[str, Any]]:
    """Return the groups of all inputs, rows of what was dropped with a reason, and the step's counts.

    `wordings` are keyed by (task, wording).
    """
    verdict_of = {(v.task, v.example, v.text, v.finish): v for v in verdicts}
    by_input: ResponsesByInput = defaultdict(list)
    for response in responses:
        by_input[response.task, response.example].append(response)
    kept, dropped = leave_out_astray(by_input, verdict_of, examples, wordings, rules)
    found = [groups_of_input(theirs, verdict_of, examples[key], wordings, rules) for key, theirs in kept.items()]
    groups = [group for one in found for group in one.groups]
    dropped += [row for one in found for row in one.dropped]
    counts = count_groups(groups) | {
        "inputs": len(by_input),
        "gold_joined": sum(one.gold_joined for one in found),
        "foreign_candidates": sum(one.num_foreign for one in found),
        "foreign_vocabulary": sum(one.num_losers for one in found),
        "dropped": dict(sorted(Counter(row["reason"] for row in dropped).items())),
    }
    return groups, dropped, counts


def leave_out_astray(
    by_input: ResponsesByInput,
    verdicts: Verdicts,
    examples: Mapping[ExampleKey, Example],
    wordings: Mapping[tuple[str, str], Wording],
    rules: RankRules,
) -> tuple[ResponsesByInput, list[Row]]:
    """Return the responses without those under astray wordings, see `find_astray`, and a row for each such wording.

    Nothing is left out while rank.min_wording_agreement is 0.
    """
    if not rules.table.min_wording_agreement:
        return by_input, []
    # By the judge in every arm, so that a control of the rewards has the wordings of the arm it is compared with.
    judged = dataclasses.replace(rules, table=rules.table.model_copy(update={"rewards": "judge"}))
    ranked = {key: rank_responses(theirs, verdicts, examples[key], judged)[0] for key, theirs in by_input.items()}
    right = {key: {item.text for item in items if item.reward == 2} for key, items in ranked.items()}
    astray = find_astray(by_input, right, wordings, rules)
    dropped = [
        {"reason": ASTRAY, "task": task, "wording": name, "text": wordings[task, name].text, "agreement": share}
        for (task, name), share in astray.items()
    ]
    kept = {key: [r for r in theirs if (r.task, r.wording) not in astray] for key, theirs in by_input.items()}
    return {key: theirs for key, theirs in kept.items() if theirs}, dropped


def groups_of_input(
    responses: Sequence[Response],
    verdicts: Verdicts,
    example: Example,
    wordings: Mapping[tuple[str, str], Wording],
    rules: RankRules,
) -> InputGroups:
    """Return the groups of one input: one per wording that it was sampled under, up to rank.wordings_per_input."""
    table, where = rules.table, {"task": example.task, "example": example.id}
    candidates, joined = rank_responses(responses, verdicts, example, rules)
    found = InputGroups(gold_joined=joined)
    best = best_of(candidates)
    if best is None:
        found.dropped.append({"reason": "no_correct_response", **where})
        return found
    if not rules.gold and len(best.wordings) < table.min_agreement * len({r.wording for r in responses}):
        found.dropped.append({"reason": "too_little_agreement", **where})
        return found
    losers = foreign_losers(responses) if table.rewards != "gold" else {}
    for wording_id in choose_wordings(responses, (example.task, example.id), table.wordings_per_input):
        own = losers.get(wording_id, [])
        group, reason, num_foreign = make_group(candidates, wordings[example.task, wording_id], example, rules, own)
        found.num_foreign += num_foreign
        if group is None:
            found.dropped.append({"reason": reason, **where, "wording": wording_id})
        else:
            found.groups.append(group)
            found.num_losers += len({c.text for c in group.candidates} & {item.text for item in own})
    return found


def choose_wordings(responses: Iterable[Response], key: ExampleKey, limit: int) -> list[str]:
    """Return the wordings under which an input was sampled, in order of appearance; `limit` > 0 keeps that many."""
    sampled = list(dict.fromkeys(response.wording for response in responses))
    if not limit:
        return sampled
    kept = set(sorted(sampled, key=lambda wording: unit_hash("rank wording", *key, wording))[:limit])
    return [wording for wording in sampled if wording in kept]


# One group


def make_group(
    candidates: Sequence[Candidate],
    wording: Wording,
    example: Example,
    rules: RankRules,
    losers: Sequence[Candidate] = (),
) -> tuple[Group | None, str, int]:
    """Return (group of one input under one wording, reason if there is none, candidates that could not be written).

    One of `candidates` is the best. `losers` were said under this wording and keep their text, see `foreign_losers`.
    """
    best = best_of(candidates)
    assert best is not None, "an input without a best answer has no groups"
    form = rules.forms.get(example.task, ())
    if reason := _cannot_ask(wording, example, best, rules.gold, form):
        return None, reason, 0
    others = [c for c in candidates if not c.best and (rules.table.pool == "all" or wording.id in c.wordings)]
    written: dict[str, Candidate] = {}
    num_foreign = 0
    for item in (best, *others):
        text = write_under(wording, example.input, item.text, form)
        if text is None:
            num_foreign += 1
            continue
        renamed = dataclasses.replace(item, text=text)
        written[text] = merge(written[text], renamed) if text in written else renamed
    best, *others = written.values()
    others += [item for item in losers if item.text not in written]
    chosen = limit_candidates(others, best, (example.task, example.id), rules.table.max_candidates)
    return Group(example.id, example.task, wording.id, tuple(chosen)), "", num_foreign


def _cannot_ask(wording: Wording, example: Example, best: Candidate, gold: bool, form: AnswerForm) -> str:
    """Return why a wording can have no group of this input, "" when it can."""
    if render_prompt(wording, example.input) is None:
        return "wording_does_not_fit"
    # A label that the map lacks is no answer that this wording asks for, while a free text may be one.
    is_gold = gold and normalise_answer(best.text, form) in {normalise_answer(text, form) for text in example.outputs}
    lacks_gold = is_gold and expected_answer(wording, example.input, best.text) is None
    unwritten = write_under(wording, example.input, best.text, form) is None
    return "best_not_in_answer_map" if lacks_gold or unwritten else ""


def write_under(wording: Wording, input_text: str, text: str, form: AnswerForm = ()) -> str | None:
    """Return a canonical answer as the wording asks for it; a text that its answer map lacks stays as it is.

    None when the result would mean something else under this wording, or nothing: it is no candidate here.
    """
    rendered = expected_answer(wording, input_text, text)
    if rendered is None:
        rendered = text
    back = canonical_answer(wording, input_text, rendered)
    return rendered if back is not None and normalise_answer(back, form) == normalise_answer(text, form) else None


def limit_candidates(
    others: Sequence[Candidate], best: Candidate, key: ExampleKey, max_candidates: int
) -> list[Candidate]:
    """Return the best and at most `max_candidates` - 1 others: in turn one of lowest and one of highest reward.

    Among equal rewards those that more wordings produced come first, then those produced more often, then by hash.
    """
    weight = {id(item): (-len(item.wordings), -item.count, unit_hash("rank", *key, item.text)) for item in others}
    lowest = sorted(others, key=lambda item: (item.reward, *weight[id(item)]))
    highest = sorted(others, key=lambda item: (-item.reward, *weight[id(item)]))
    kept: dict[str, Candidate] = {}
    turn = 0
    while len(kept) < min(len(others), max_candidates - 1):
        order = highest if turn % 2 else lowest
        chosen = next(item for item in order if item.text not in kept)
        kept[chosen.text] = chosen
        turn += 1
    return [best, *sorted(kept.values(), key=lambda item: (-item.reward, *weight[id(item)]))]


def foreign_losers(responses: Iterable[Response]) -> dict[str, list[Candidate]]:
    """Return {wording: its distinct whole responses in another wording's vocabulary} of one input, reward 0.

    They mean nothing under the other wordings, so they are in no pool and their reward is never permuted; under their
    own wording the word that it did not ask for has to lose.
    """
    found: dict[str, dict[str, Candidate]] = defaultdict(dict)
    for response in responses:
        text = response.text.strip()
        if response.canonical is None and text and response.finish == "stop":
            theirs = found[response.wording]
            new = Candidate(text, 0, "stop", 1, (response.wording,))
            theirs[text] = merge(theirs[text], new) if text in theirs else new
    return {wording: list(theirs.values()) for wording, theirs in found.items()}


# What is counted and printed


def count_groups(groups: Sequence[Group]) -> dict[str, Any]:
    """Return the number of groups, of each size, of ordered and tied pairs, and the share with an ordered pair."""
    ordered = tied = with_order = 0
    for group in groups:
        per_reward = Counter(candidate.reward for candidate in group.candidates)
        size = len(group.candidates)
        ties = sum(number * (number - 1) // 2 for number in per_reward.values())
        tied += ties
        ordered += size * (size - 1) // 2 - ties
        with_order += len(per_reward) > 1
    sizes = Counter(len(group.candidates) for group in groups)
    return {
        "groups": len(groups),
        "inputs_with_groups": len({(group.task, group.example) for group in groups}),
        "sizes": {str(size): sizes[size] for size in sorted(sizes)},
        "ordered_pairs": ordered,
        "tied_pairs": tied,
        "groups_with_ordered_pair": with_order,
        "share_with_ordered_pair": with_order / len(groups) if groups else 0.0,
    }


def require_gold(table: RankTable, gold: bool) -> None:
    """Raise UserError for rewards that come from gold answers when the judge went without them."""
    if table.rewards in ("exact", "gold") and not gold:
        raise UserError(
            f'rank.rewards="{table.rewards}" takes its rewards from gold answers, but the judge step ran with'
            ' judge.gold=false; use rank.rewards="judge", or judge with gold answers'
        )


def explain_no_groups(counts: Mapping[str, Any]) -> str:
    """Return what to tell the user when nothing is left to align on."""
    reasons = ", ".join(f"{reason}: {number}" for reason, number in counts["dropped"].items()) or "nothing was sampled"
    return (
        f"no group came out of {counts['inputs']} inputs ({reasons}); sample more (sample.samples,"
        " sample.wordings_per_input), train stage 1 longer, judge with gold answers (judge.gold=true), or without them"
        " ask for less agreement (rank.min_agreement)"
    )


def describe_groups(counts: Mapping[str, Any]) -> list[str]:
    """Return printable lines of the step's counts."""
    lines = [
        f"{counts['groups']} groups of {counts['inputs_with_groups']} inputs (of {counts['inputs']} sampled)",
        "candidates per group: " + ", ".join(f"{size}: {number}" for size, number in counts["sizes"].items()),
        f"{counts['ordered_pairs']} ordered pairs, {counts['tied_pairs']} ties;"
        f" {100 * counts['share_with_ordered_pair']:.1f} % of the groups have an ordered pair",
        f"the gold answer joined for {counts['gold_joined']} inputs; {counts['foreign_candidates']} candidates left out"
        " because they could not be written under a group's wording",
        f"{counts['foreign_vocabulary']} candidates are words of another wording, with reward 0 where they were said",
    ]
    if counts["dropped"]:
        lines.append("dropped " + ", ".join(f"{reason}: {number}" for reason, number in counts["dropped"].items()))
    return lines
