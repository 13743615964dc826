"""Verdicts to groups: one wording as prompt, the distinct responses to an input ranked under it.

Used by launch/rank.py. Takes the responses that electing.py has pooled and ranked and writes every candidate as the
group's wording asks for it. Knows no model and no tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from coalign.config import RankTable
from coalign.errors import UserError
from coalign.judging.best_answer import Pooled, find_astray, merge, pool, rank_input
from coalign.records import ASTRAY, Candidate, Example, ExampleKey, Group, Response, Verdict, Wording
from coalign.text import normalise_answer, unit_hash
from coalign.wordings.wordings import canonical_answer, expected_answer, render_prompt

ByInput = dict[ExampleKey, list[Response]]


def write_under(wording: Wording, input_text: str, text: str) -> str | None:
    """Return a canonical answer as the wording asks for it; a text that its answer map lacks stays as it is.

    None when the result would mean something else under this wording, or nothing: it is no candidate here.
    """
    rendered = expected_answer(wording, input_text, text)
    if rendered is None:
        rendered = text
    back = canonical_answer(wording, input_text, rendered)
    return rendered if back is not None and normalise_answer(back) == normalise_answer(text) else None


def limit_candidates(others: Sequence[Pooled], best: Pooled, key: ExampleKey, max_candidates: int) -> list[Pooled]:
    """Return the best and at most `max_candidates` - 1 others: in turn one of lowest and one of highest reward.

    Among equal rewards those that more wordings produced come first, then those produced more often, then by hash.
    """
    weight = {id(item): (-len(item.wordings), -item.count, unit_hash("rank", *key, item.text)) for item in others}
    lowest = sorted(others, key=lambda item: (item.reward, *weight[id(item)]))
    highest = sorted(others, key=lambda item: (-item.reward, *weight[id(item)]))
    kept: dict[str, Pooled] = {}
    turn = 0
    while len(kept) < min(len(others), max_candidates - 1):
        order = highest if turn % 2 else lowest
        chosen = next(item for item in order if item.text not in kept)
        kept[chosen.text] = chosen
        turn += 1
    return [best, *sorted(kept.values(), key=lambda item: (-item.reward, *weight[id(item)]))]


def make_group(
    pooled: Sequence[Pooled],
    best: Pooled,
    wording: Wording,
    example: Example,
    table: RankTable,
    gold: bool,
    losers: Sequence[Pooled] = (),
) -> tuple[Group | None, str, int]:
    """Return (group of one input under one wording, reason if there is none, candidates that could not be written).

    `losers` are said under this wording and stay as they are, see `foreign_losers`.
    """
    if render_prompt(wording, example.input) is None:
        return None, "wording_does_not_fit", 0
    best_text = write_under(wording, example.input, best.text)
    # A label that the map lacks is no answer that this wording asks for, while a free text may be one.
    is_gold = gold and normalise_answer(best.text) in {normalise_answer(text) for text in example.outputs}
    if best_text is None or (is_gold and expected_answer(wording, example.input, best.text) is None):
        return None, "best_not_in_answer_map", 0
    merged = {best_text: dataclasses.replace(best, text=best_text)}
    foreign = 0
    for item in pooled:
        if item.text == best.text or (table.pool == "own" and wording.id not in item.wordings):
            continue
        text = write_under(wording, example.input, item.text)
        if text is None:
            foreign += 1
            continue
        written = dataclasses.replace(item, text=text)
        merged[text] = merge(merged[text], written) if text in merged else written
    others = [item for text, item in merged.items() if text != best_text]
    others += [item for item in losers if item.text not in merged]
    chosen = limit_candidates(others, merged[best_text], (example.task, example.id), table.max_candidates)
    candidates = tuple(
        Candidate(item.text, item.reward, item.finish, item.count, item.wordings, best=item.text == best_text)
        for item in chosen
    )
    return Group(example.id, example.task, wording.id, candidates), "", foreign


def foreign_losers(responses: Iterable[Response]) -> dict[str, list[Pooled]]:
    """Return {wording: its distinct whole responses in another wording's vocabulary} of one input, reward 0.

    They mean nothing under the other wordings, so they are in no pool and their reward is never permuted; under their
    own wording the word that it did not ask for has to lose.
    """
    found: dict[str, dict[str, Pooled]] = defaultdict(dict)
    for response in responses:
        text = response.text.strip()
        if response.canonical is None and text and response.finish == "stop":
            theirs = found[response.wording]
            new = Pooled(text, 0, False, "stop", 1, (response.wording,))
            theirs[text] = merge(theirs[text], new) if text in theirs else new
    return {wording: list(theirs.values()) for wording, theirs in found.items()}


def leave_out_astray(
    by_input: ByInput,
    right: Mapping[ExampleKey, Collection[str]],
    wordings: Mapping[tuple[str, str], Wording],
    least: float,
) -> tuple[ByInput, list[dict[str, Any]]]:
    """Return the responses under the wordings that are not astray, see `find_astray`, and a row for each that is."""
    astray = find_astray(by_input, right, wordings, least)
    dropped = [
        {"reason": ASTRAY, "task": task, "wording": name, "text": wordings[task, name].text, "agreement": share}
        for (task, name), share in astray.items()
    ]
    kept = {key: [r for r in theirs if (r.task, r.wording) not in astray] for key, theirs in by_input.items()}
    return {key: theirs for key, theirs in kept.items() if theirs}, dropped


def make_groups(
    responses: Iterable[Response],
    verdicts: Iterable[Verdict],
    examples: Mapping[ExampleKey, Example],
    wordings: Mapping[tuple[str, str], Wording],
    table: RankTable,
    gold: bool,
    seed: int,
) -> tuple[list[Group], list[dict[str, Any]], dict[str, Any]]:
    """Return the groups of all inputs, rows of what was dropped with a reason, and the step's counts.

    `gold` is False when the judge treated the align inputs as unlabelled: gold answers are then not looked at.
    """
    verdict_of = {(v.task, v.example, v.text, v.finish): v for v in verdicts}
    by_input: ByInput = defaultdict(list)
    for response in responses:
        by_input[response.task, response.example].append(response)
    num_inputs = len(by_input)

    def rank_one(key: ExampleKey, arm: RankTable) -> tuple[list[Pooled], Pooled | None, bool]:
        pooled = pool(by_input[key], verdict_of, examples[key].outputs if gold else (), arm.rewards)
        return rank_input(pooled, examples[key], arm, gold, seed)

    groups: list[Group] = []
    dropped: list[dict[str, Any]] = []
    if table.min_wording_agreement:
        # By the judge in every arm, so that a control of the rewards has the wordings of what it is compared with.
        judged = table.model_copy(update={"rewards": "judge"})
        right = {key: {item.text for item in rank_one(key, judged)[0] if item.reward == 2} for key in by_input}
        by_input, dropped = leave_out_astray(by_input, right, wordings, table.min_wording_agreement)
    num_joined = num_foreign = num_losers = 0
    for key, theirs in by_input.items():
        example = examples[key]
        ranked, best, joined = rank_one(key, table)
        num_joined += joined
        if best is None:
            dropped.append({"reason": "no_correct_response", "task": example.task, "example": example.id})
            continue
        if not gold and len(best.wordings) < table.min_agreement * len({r.wording for r in theirs}):
            dropped.append({"reason": "too_little_agreement", "task": example.task, "example": example.id})
            continue
        losers = foreign_losers(theirs) if table.rewards != "gold" else {}
        for wording_id in choose_wordings(theirs, key, table.wordings_per_input):
            wording = wordings[example.task, wording_id]
            own = losers.get(wording_id, [])
            group, reason, foreign = make_group(ranked, best, wording, example, table, gold, own)
            num_foreign += foreign
            if group is None:
                dropped.append({"reason": reason, "task": example.task, "example": example.id, "wording": wording_id})
            else:
                groups.append(group)
                num_losers += len({c.text for c in group.candidates} & {item.text for item in own})
    counts = count_groups(groups) | {
        "inputs": num_inputs,
        "gold_joined": num_joined,
        "foreign_candidates": num_foreign,
        "foreign_vocabulary": num_losers,
        "dropped": dict(sorted(Counter(row["reason"] for row in dropped).items())),
    }
    return groups, dropped, counts


def choose_wordings(responses: Iterable[Response], key: ExampleKey, limit: int) -> list[str]:
    """Return the wordings under which an input was sampled, in order of appearance; `limit` > 0 keeps some by hash."""
    sampled = list(dict.fromkeys(response.wording for response in responses))
    if not limit:
        return sampled
    kept = set(sorted(sampled, key=lambda wording: unit_hash("rank wording", *key, wording))[:limit])
    return [wording for wording in sampled if wording in kept]


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
        "candidates a group: " + ", ".join(f"{size}: {number}" for size, number in counts["sizes"].items()),
        f"{counts['ordered_pairs']} ordered pairs, {counts['tied_pairs']} ties;"
        f" {100 * counts['share_with_ordered_pair']:.1f} % of the groups have an ordered pair",
        f"the gold answer joined for {counts['gold_joined']} inputs; {counts['foreign_candidates']} candidates left out"
        " because they could not be written under a group's wording",
        f"{counts['foreign_vocabulary']} candidates are words of another wording, with reward 0 where they were said",
    ]
    if counts["dropped"]:
        lines.append("dropped " + ", ".join(f"{reason}: {number}" for reason, number in counts["dropped"].items()))
    return lines
