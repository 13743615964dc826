"""Which pictures the report has: from metrics.json and a run's steps to charts, each with a caption.

The numbers behind a picture are in a table of the page as well. Knows no file and no HTML.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from coalign.evaluation.metrics_rows import TaskMetrics, WordingMetrics
from coalign.evaluation.metrics_schema import Metrics, NoiseFloor
from coalign.experiment.arms import ARMS, COMPARISONS
from coalign.report import charts, run_history
from coalign.report.charts import MAX_DOTS, MAX_ROWS, Arrow, Curve, Dot
from coalign.report.formatting import MORE, number
from coalign.report.svg import GREY, SERIES

OUTCOME_PARTS = {"always_right": SERIES[0], "always_wrong_alike": SERIES[1], "inconsistent": GREY, "mixed": SERIES[3]}
KIND_PARTS = {
    "right": ("right", SERIES[0]),
    "another": ("another answer", SERIES[1]),
    "wrong_type": ("wrong type", SERIES[3]),
    "cut_off": ("cut off", SERIES[4]),
    "empty": ("empty", GREY),
}
REWARD_PARTS = {
    "2": ("2: correct", SERIES[0]),
    "1": ("1: right type, incorrect", SERIES[4]),
    "0": ("0: wrong type, cut off or empty", GREY),
}
MAX_PAIRS = 4
MAX_ARROWS = 300  # of a picture
MAIN_ARMS = ("sft_ia", "cat")
_STAGES = ("base", "sft", "align")


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """A picture with its title and what to know to read it."""

    title: str
    caption: str
    svg: str


def model_dots(metrics: Metrics, key: str, floors: bool = False) -> list[Dot]:
    """Return a row of `interval_dots` for each model."""
    rows = []
    for index, (name, model) in enumerate(metrics.models.items()):
        one = model.all.of(key)
        marks = (model.noise.neighbours.cr, model.noise.temperature.cr) if floors else ()
        colour = charts.colour_of(index, len(metrics.models))
        rows.append(Dot(metrics.label(name), one.mean, one.low, one.high, colour, marks))
    return rows


def floor_size(floor: NoiseFloor) -> str:
    """Return how much a noise floor rests on."""
    inputs, repeats = floor.num_inputs, floor.num_repeats
    return f"{inputs} input{'s' if inputs != 1 else ''} × {repeats} answers"


def dots_in_words(rows: Sequence[Dot]) -> str:
    """Return the rows in words, as a picture's alternative text."""
    said = []
    for row in rows:
        interval = "" if row.low is None else f", interval {number(row.low)} to {number(row.high)}"
        said.append(f"{row.label} {number(row.mean)}{interval}")
    return "; ".join(said)


def headline_figures(metrics: Metrics) -> list[Figure]:
    """Return consistency and accuracy of every model, with intervals and noise floors."""
    found = []
    if metrics.num_tasks_in_cr:
        rows = model_dots(metrics, "cr", floors=True)
        floors = ("one wording asked again", f"sampled at {metrics.noise_temperature}")
        any_floor = any(value is not None for row in rows for value in row.floors)
        svg = charts.interval_dots(rows, f"Consistency: {dots_in_words(rows)}", floors=floors if any_floor else ())
        caption = "CR: share of pairs of wordings whose answers agree. Bar: 95 % interval."
        if any_floor:
            noise = [model.noise for model in metrics.models.values()]
            all_floors = (floor for one in noise for floor in (one.neighbours, one.temperature))
            largest = max(all_floors, key=lambda floor: floor.num_inputs)
            caption += f" The marks are noise floors: CR of one and the same wording ({floor_size(largest)})."
        found.append(Figure("How consistent", caption, svg))
    rows = model_dots(metrics, "accuracy")
    svg = charts.interval_dots(rows, f"Accuracy: {dots_in_words(rows)}")
    found.append(Figure("How accurate", "Share of answers that equal a gold answer. Bar: 95 % interval.", svg))
    return found


def outcome_figure(metrics: Metrics) -> Figure | None:
    """Return the shares of inputs always right, always wrong alike, inconsistent and mixed."""
    if not metrics.num_tasks_in_cr:
        return None
    parts = [key for key in OUTCOME_PARTS if any(model.all.of(key).mean for model in metrics.models.values())]
    rows = [
        (metrics.label(name), [model.all.of(key).mean or 0.0 for key in parts])
        for name, model in metrics.models.items()
    ]
    named = [(MORE[key], OUTCOME_PARTS[key]) for key in parts]
    said = "; ".join(
        f"{name}: " + ", ".join(f"{part} {value:.0%}" for (part, _), value in zip(named, values, strict=True))
        for name, values in rows
    )
    caption = "Every input is one of these over all its wordings. A model that always says the same has CR 1, yet is"
    return Figure(
        "Always right, wrong alike, or inconsistent",
        f"{caption} always wrong alike on most inputs.",
        charts.stacked_bars(rows, named, f"Outcomes by model: {said}"),
    )


def model_pairs(metrics: Metrics) -> list[tuple[str, str]]:
    """Return which models are set against each other, before and after, MAX_PAIRS at most.

    Stage after stage; the arms of an experiment as arms.py compares them; else the first against others and the last.
    """
    names = list(metrics.models)
    if _are_stages(metrics):
        return list(itertools.pairwise(names))
    if sum(name in ARMS for name in names) > 1:
        compared = [(a, b) for b, a, _ in COMPARISONS if {a, b} <= {*names}]
        if compared:
            return compared[:MAX_PAIRS]
    others = names[1:]
    return [(names[0], other) for other in (*others[: MAX_PAIRS - 1], *others[MAX_PAIRS - 1 :][-1:])]


def main_pair(metrics: Metrics) -> tuple[str, str]:
    """Return the two models to show where there is room for one pair: what the last stage did, if that is known."""
    names = list(metrics.models)
    pairs = model_pairs(metrics)
    if MAIN_ARMS in pairs:
        return MAIN_ARMS
    return pairs[-1] if pairs and _are_stages(metrics) else (names[0], names[-1])


def _are_stages(metrics: Metrics) -> bool:
    sources = [metrics.sources.get(name, "") for name in metrics.models]
    return all(source in _STAGES for source in sources) and sources == sorted(sources, key=_STAGES.index)


def task_figures(metrics: Metrics) -> list[Figure]:
    """Return CR against accuracy by task, with an arrow from before to after, for each pair of models."""
    tasks = [row for row in metrics.per_task if next(iter(row.models.values())).cr is not None]
    found = []
    for before, after in model_pairs(metrics) if tasks else ():
        moves = [Arrow(row.task, _point(row.models[before]), _point(row.models[after])) for row in tasks]
        up = sum(move.end[1] > move.start[1] for move in moves)
        down = sum(move.end[1] < move.start[1] for move in moves)
        right = sum(move.end[0] > move.start[0] for move in moves)
        left = sum(move.end[0] < move.start[0] for move in moves)
        said = (
            f"Of {len(moves)} tasks {up} became more consistent and {down} less; {right} more accurate and {left} less."
        )
        start_label, end_label = metrics.label(before), metrics.label(after)
        alt = f"CR against accuracy by task, {start_label} to {end_label}. {said}"
        drawn = sorted(moves, key=Arrow.length, reverse=True)[:MAX_ARROWS]
        svg = charts.arrows(drawn, ("accuracy", "CR"), alt)
        caption = f"{said} Solid blue: CR rose; dashed orange: it fell."
        if len(drawn) < len(moves):
            caption += f" {len(drawn)} of {len(moves)} tasks are drawn, those that moved furthest."
        found.append(Figure(f"{start_label} → {end_label}", caption, svg))
    return found


def _point(one: TaskMetrics) -> tuple[float, float]:
    assert one.cr is not None, "a task enters CR under every model or under none"
    return one.accuracy, one.cr


def wording_figures(metrics: Metrics) -> list[Figure]:
    """Return each wording's accuracy under both models of the main pair, a row per task, the widest spread first."""
    names = main_pair(metrics) if len(metrics.models) > 1 else list(metrics.models)
    values: dict[str, list[dict[str, WordingMetrics]]] = {}
    for row in metrics.per_wording:
        values.setdefault(row.task, []).append(row.models)
    of = {
        name: {task: [one[name].accuracy for one in rows] for task, rows in values.items() if len(rows) > 1}
        for name in names
    }
    spreads = {task: max(one) - min(one) for task, one in of[names[-1]].items()}
    ranked = sorted(spreads, key=lambda task: (-spreads[task], task))[:MAX_ROWS]
    shown = f"{len(ranked)} of {len(spreads)} tasks" if len(ranked) < len(spreads) else "Every task"
    caption = f"{shown}, the widest spread first: a dot per wording, a bar at their mean."
    if any(len(values[task]) > MAX_DOTS for task in ranked):
        caption += f" Where a task has more than {MAX_DOTS} wordings, {MAX_DOTS} quantiles are drawn, with both ends."
    found = []
    for name in names if ranked else ():
        said = "; ".join(
            f"{task}: worst {min(of[name][task]):.2f}, best {max(of[name][task]):.2f}" for task in ranked[:8]
        )
        colour = SERIES[0] if name == names[-1] else GREY
        svg = charts.strips([(task, of[name][task]) for task in ranked], f"Accuracy of each wording. {said}", colour)
        found.append(Figure(f"Accuracy of each wording, {metrics.label(name)}", caption, svg))
    return found


def failure_figure(metrics: Metrics) -> Figure | None:
    """Return the shares of right answers and of each kind of failure by model."""
    if metrics.failures is None:
        return None
    rows = [
        (metrics.label(name), [counts.of(kind) for kind in KIND_PARTS])
        for name, counts in metrics.failures.models.items()
    ]
    said = "; ".join(
        f"{name}: " + ", ".join(f"{n} {part}" for (part, _), n in zip(KIND_PARTS.values(), values, strict=True))
        for name, values in rows
    )
    svg = charts.stacked_bars(rows, list(KIND_PARTS.values()), f"Answers by kind: {said}")
    return Figure("How answers fail", "Shares of all answers, every one counted once.", svg)


def reward_figure(counts: Mapping[str, Any], title: str) -> Figure:
    """Return the judge's rewards by task, the highest share of 2 first."""
    by_task: dict[str, dict[str, int]] = counts["rewards_by_task"]

    def share(task: str) -> float:
        return by_task[task]["2"] / max(1, sum(by_task[task].values()))

    ranked = sorted(by_task, key=lambda task: (-share(task), task))
    shown = ranked[:MAX_ROWS]
    rows = [(task, [float(by_task[task][reward]) for reward in REWARD_PARTS]) for task in shown]
    totals = ", ".join(f"{counts['rewards'][reward]} with reward {reward}" for reward in ("2", "1", "0"))
    caption = f"{totals}. " + (f"{len(shown)} of {len(ranked)} tasks are shown." if len(shown) < len(ranked) else "")
    svg = charts.stacked_bars(rows, list(REWARD_PARTS.values()), f"Rewards by task: {totals}")
    return Figure(title, caption, svg)


def size_figure(counts: Mapping[str, Any], title: str) -> Figure:
    """Return how many groups there are of each size."""
    sizes = sorted(((str(size), n) for size, n in counts["sizes"].items()), key=lambda pair: int(pair[0]))
    said = ", ".join(f"{n} of {size}" for size, n in sizes)
    svg = charts.columns(sizes, "responses in a group", f"Groups by number of responses: {said}")
    return Figure(title, "How many responses are ranked under one prompt.", svg)


# (title, caption, [(kind, quantity, name)])
_SFT = [
    ("Loss", "Negative log-likelihood per token of the gold answers; dev: on dev inputs.",
     [("train", "loss", "train"), ("dev", "dev_loss", "dev")]),
]  # fmt: skip
_ALIGN = [
    ("Loss and its parts", "The best response's term, and the ranking term before its weight.",
     [("train", "loss", "loss"), ("train", "loss_best", "best"), ("train", "loss_ranking", "ranking")]),
    ("p of best and worst responses", "Mean log-probability per token; others: all but the best; gold: of dev answers.",
     [("train", "p_best", "best"), ("train", "p_others", "others"), ("train", "p_worst", "worst"),
      ("dev", "p_gold", "gold (dev)")]),
    ("Share of active pairs", "Pairs that still push: the hinge is not zero.", [("train", "active_pairs", "active")]),
    ("Length", "Tokens of the best responses.", [("train", "best_length", "tokens")]),
]  # fmt: skip
_BOTH = [
    ("On dev inputs", "Short greedy answers under dev wordings, at intervals while training.",
     [("dev", "cr", "CR"), ("dev", "accuracy", "accuracy"), ("dev", "end_of_turn", "ends turn")]),
    ("Learning rate", "", [("train", "learning_rate", "learning rate")]),
    ("Gradient norm", "Before clipping.", [("train", "grad_norm", "norm")]),
]  # fmt: skip


def training_figures(step: run_history.StepRecord) -> list[Figure]:
    """Return the curves of a training stage: those of the quantities that were logged."""
    logged = run_history.training_curves(step)
    found = []
    for title, caption, wanted in [*(_ALIGN if step.name == "align" else _SFT), *_BOTH]:
        lines = []
        for index, (kind, key, name) in enumerate(wanted):
            points = logged[kind].get(key, [])
            if points:
                xs, ys = zip(*points, strict=True)
                lines.append(Curve(name, xs, ys, SERIES[index], dots=kind == "dev"))
        if lines:
            said = "; ".join(f"{line.name} from {line.ys[0]:.3g} to {line.ys[-1]:.3g}" for line in lines)
            found.append(Figure(title, caption, charts.curves(lines, f"{title}: {said}")))
    return found
