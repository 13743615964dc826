"""What a result comes to, in sentences: how consistent, how accurate, what moved, noise floors, constant answers.

Knows metrics.json and no HTML.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from coalign.evaluation.agreement import describe_judge
from coalign.evaluation.metrics_schema import Estimate, Metrics
from coalign.report import figures
from coalign.report.formatting import number, with_interval


def headline_sentence(metrics: Metrics) -> str:
    """Return in one sentence how consistent and how accurate the models are, before and after, with noise floors."""
    names = list(metrics.models)
    first, last = names[0], names[-1]
    noise = noise_clause(metrics, list(dict.fromkeys((first, last))))
    if len(names) == 1:
        own = metrics.models[last].all
        parts = [
            f"{text} {with_interval(one)}" for text, one in (("a CR of", own.cr), ("an accuracy of", own.accuracy))
        ]
        return f"{metrics.label(last)} has {' and '.join(parts)}{noise}."
    return f"{moved_sentence(metrics, first, last)}{noise}."


def noise_clause(metrics: Metrics, names: Sequence[str]) -> str:
    """Return what CR one and the same wording gives under each of these models, "" where that wasn't asked."""
    clauses: list[str] = []
    named: list[str] = []
    size = ""
    noise = {name: metrics.models[name].noise for name in names}
    for how, floors in (
        ("asked again", {name: noise[name].neighbours for name in names}),
        (f"sampled at temperature {metrics.noise_temperature}", {name: noise[name].temperature for name in names}),
    ):
        known = [name for name in names if floors[name].cr is not None]
        of = {name: "" if known == named else f" for {metrics.label(name)}" for name in known}
        if known:
            named, size = known, figures.floor_size(floors[known[0]])
            clauses.append(f"{' and '.join(number(floors[name].cr) + of[name] for name in known)} {how}")
    return f"; the noise floor of CR (one wording, {size}) is {', '.join(clauses)}" if clauses else ""


def judge_sentence(metrics: Metrics) -> str:
    """Return how often the judge errs that decides which answers agree, on which every CR rests; "" without one."""
    if metrics.agreement_judge is None:
        return ""
    return f"CR and MCR rest on a judge of agreement ({describe_judge(metrics.agreement_judge)})."


def last_stage_sentence(metrics: Metrics) -> str:
    """Return what the last stage did by itself, "" where that isn't known or is what the headline says."""
    names = list(metrics.models)
    pair = figures.main_pair(metrics)
    return "" if pair == (names[0], names[-1]) else f"{moved_sentence(metrics, *pair)}."


def moved_sentence(metrics: Metrics, before: str, after: str) -> str:
    """Return how consistency and accuracy moved from one model to another."""
    paired = _paired(metrics, before, after)
    start, end = metrics.models[before].all, metrics.models[after].all
    parts = [
        _moved(name, start.of(key), end.of(key), paired.get(key))
        for key, name in (("cr", "consistency (CR)"), ("accuracy", "accuracy"))
    ]
    return f"From {metrics.label(before)} to {metrics.label(after)}, {', and '.join(parts)}"


def _paired(metrics: Metrics, before: str, after: str) -> dict[str, Estimate]:
    """Return the paired differences by metric; metrics.json has each pair in the order of the models."""
    found = {}
    for row in metrics.differences:
        if (row.a, row.b) == (before, after):
            found[row.metric] = row.estimate
        elif (row.b, row.a) == (before, after):
            found[row.metric] = _negated(row.estimate)
    return found


def _negated(one: Estimate) -> Estimate:
    mean, low, high = (None if value is None else -value for value in (one.mean, one.high, one.low))
    return dataclasses.replace(one, mean=mean, low=low, high=high)


def _moved(name: str, before: Estimate, after: Estimate, paired: Estimate | None) -> str:
    if before.mean is None or after.mean is None or paired is None:
        return f"{name} is not known (too few wordings per task)"
    change = f"{with_interval(before)} to {with_interval(after)}, by {with_interval(paired, signed=True)}"
    if paired.low is None or paired.high is None:
        return f"{name} went from {change} (too few tasks for an interval)"
    if paired.low > 0 or paired.high < 0:
        return f"{name} {'rose' if paired.low > 0 else 'fell'} from {change}"
    return f"{name} went from {change} (no change is shown: the interval contains 0)"


def constant_sentence(metrics: Metrics) -> str:
    """Return how far the models are above always giving a task's most frequent answer, "" where eval didn't say."""
    found = metrics.constant_answer
    if found is None:
        return ""
    above = "; ".join(
        f"{metrics.label(name)} {with_interval(one, signed=True)}" for name, one in found.differences.items()
    )
    return (
        "One constant answer per task, its most frequent gold answer, would have an accuracy of"
        f" {number(found.accuracy.mean)}; minus that, accuracy: {above}."
    )
