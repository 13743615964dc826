"""What an experiment shows: its table as Markdown and its figure, both made from the ladder's metrics.json alone.

matplotlib is imported when a figure is drawn. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalign.experiment.ladder_result import ArmDifference, LadderResult
from coalign.report.formatting import SET_NAMES, names_of, number, shown_sets, with_interval

COLUMNS = names_of("accuracy", "cr", "corrected_cr", "mcr", "worst_wording", "rouge_l")
DRAWN = ("accuracy", "cr")
# Okabe and Ito's colours, which also differ in lightness; a seed differs from a mean in shape as well.
MEAN, SEED, LINE = "#0072B2", "#D55E00", "#999999"


def updates_text(updates: Sequence[float]) -> str:
    """Return the updates of the trainings one after another, such as 300 + 40."""
    return " + ".join(f"{n:,.0f}" if float(n).is_integer() else f"{n:,.1f}" for n in updates) or "0"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as a Markdown table, the first its head."""
    rule = ["---", *(["---:"] * (len(rows[0]) - 1))]
    return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]


def name_seeds(seeds: Sequence[int]) -> str:
    """Return "seed 0" or "seeds 0, 1, 2"."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def table_lines(result: LadderResult) -> list[str]:
    """Return table.md."""
    seeds = name_seeds(result.seeds)
    lines = [
        f"# {result.name}: {len(result.arms)} arms, {seeds}",
        "",
        f"{result.num_tasks} tasks, {result.split} inputs and wordings, agreement {result.agreement}. An arm's"
        " number is the mean over the seeds of the mean over tasks; the numbers of each seed are below.",
        "",
        *arm_table(result),
        "",
        *ladder_cost_lines(result),
    ]
    for which in shown_sets(result):
        lines += ["", f"## Paired differences, {SET_NAMES[which]}", "", *difference_table(result, which)]
    lines += ["", *interval_lines(result), "", "## Every seed", "", *seed_table(result), "", "## The arms", ""]
    lines += arm_lines(result)
    return lines


def arm_table(result: LadderResult) -> list[str]:
    """Return a row per arm: means over all tasks, and what the arm costs."""
    rows = [["arm", *COLUMNS.values(), "updates", "tokens trained", "tokens generated", "core-hours"]]
    for name, arm in result.arms.items():
        cost = arm.cost
        cells = [number(arm.metrics.all.of(metric).mean) for metric in COLUMNS]
        tokens = [f"{tokens:,.0f}" for tokens in (cost.tokens_trained, cost.tokens_generated)]
        rows.append([f"{name}: {arm.title}", *cells, updates_text(cost.updates), *tokens, number(cost.core_hours)])
    return markdown(rows)


def ladder_cost_lines(result: LadderResult) -> list[str]:
    """Return what the costs mean."""
    total, asked = result.cost.together, result.cost.eval
    return [
        "Updates, tokens and core-hours are those of one seed, each arm counted as if it were alone: with every step"
        " that it is made from, evaluation left out. Shared steps run once, so the whole experiment took"
        f" {total.tokens_trained:,.0f} tokens trained, {total.tokens_generated:,.0f} generated and"
        f" {total.core_hours:.2f} core-hours over all seeds, of which evaluation"
        f" {asked.tokens_generated:,.0f} tokens and {asked.core_hours:.2f} core-hours.",
    ]


def difference_table(result: LadderResult, which: str) -> list[str]:
    """Return a row per comparison."""
    by_pair: dict[tuple[str, str], dict[str, ArmDifference]] = {}
    for row in result.differences.over(which):
        by_pair.setdefault((row.b, row.a), {})[row.metric] = row
    if not by_pair:
        return ["None of the comparisons is among the chosen arms."]
    rows = [["difference", *COLUMNS.values(), "what it tells"]]
    for (b, a), found in by_pair.items():
        what = next(iter(found.values())).what
        rows.append([f"{b} - {a}", *(with_interval(found[metric].estimate, signed=True) for metric in COLUMNS), what])
    return markdown(rows)


def interval_lines(result: LadderResult) -> list[str]:
    """Return how the intervals are made."""
    lines = [
        "Differences are paired by task: each task's mean over the seeds first, then 95 % over tasks, by a two-level"
        f" bootstrap over tasks and inputs ({result.num_bootstrap:,} resamples) from 20 tasks on, a t interval on"
        " task means below and always for the worst wording (a minimum is biased in resampled inputs), under 6 tasks"
        " the difference alone. An interval that contains 0 shows nothing. CR is over"
        f" {result.num_tasks_in_cr} tasks."
    ]
    if result.tasks_left_out:
        lines.append(f"Left out, since not every seed has them: {', '.join(result.tasks_left_out)}.")
    return lines


def seed_table(result: LadderResult) -> list[str]:
    """Return every arm's numbers for every seed, over all tasks."""
    rows = [["arm", "seed", *COLUMNS.values()]]
    for name, arm in result.arms.items():
        for index, seed in enumerate(result.seeds):
            cells = [(arm.metrics.all.of(metric).seeds or [None] * (index + 1))[index] for metric in COLUMNS]
            rows.append([name, str(seed), *map(number, cells)])
    return markdown(rows)


def arm_lines(result: LadderResult) -> list[str]:
    """Return what each arm sets beyond the common config."""
    lines = []
    for name, arm in result.arms.items():
        settings = ", ".join(f"`{key}={value}`" for key, value in arm.settings.items())
        lines.append(f"- `{name}`, {arm.title}: {settings or 'nothing beyond the common settings'}")
    return lines


def draw(result: LadderResult, folder: Path) -> list[Path]:
    """Write figure.svg and figure.png: every arm's accuracy and CR above, the paired differences below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = list(result.arms)
    pairs = list(dict.fromkeys((row.b, row.a) for row in result.differences.all))
    heights = [len(arms) + 1, max(1, len(pairs)) + 1]
    settings: Any = {"font.size": 9, "svg.hashsalt": "coalign", "svg.fonttype": "none", "axes.axisbelow": True}
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(
            *(2, 2),
            figsize=(11, 1.6 + 0.3 * sum(heights)),
            sharey="row",
            gridspec_kw={"height_ratios": heights},
            layout="constrained",
        )
        for column, metric in enumerate(DRAWN):
            _draw_arms(axes[0, column], result, arms, metric)
            _draw_differences(axes[1, column], result, pairs, metric)
        seeds = name_seeds(result.seeds)
        figure.suptitle(f"{result.name}: {seeds}, {result.num_tasks} tasks", fontsize=11)
        paths = [folder / "figure.svg", folder / "figure.png"]
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=150)
        pyplot.close(figure)
    return paths


def _draw_arms(axes: Any, result: LadderResult, arms: Sequence[str], metric: str) -> None:
    found = [result.arms[arm].metrics.all.of(metric) for arm in arms]
    for place, values in enumerate(found):
        axes.plot(values.seeds, [place] * len(values.seeds), "o", color=SEED, markersize=4.5, alpha=0.75)
        if values.mean is not None:
            axes.plot([values.mean], [place], "|", color=MEAN, markersize=15, markeredgewidth=2.5)
    axes.plot([], [], "o", color=SEED, markersize=4.5, label="a seed")
    axes.plot([], [], "|", color=MEAN, markersize=12, markeredgewidth=2.5, label="mean over seeds")
    axes.set_yticks(range(len(arms)), [result.arms[arm].title for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_title(COLUMNS[metric])
    axes.grid(axis="x", color=LINE, alpha=0.3)
    if metric == DRAWN[0]:
        axes.legend(loc="best", fontsize=8, framealpha=0.9)


def _draw_differences(axes: Any, result: LadderResult, pairs: Sequence[tuple[str, str]], metric: str) -> None:
    rows = {(row.b, row.a): row for row in result.differences.all if row.metric == metric}
    axes.axvline(0.0, color="black", linewidth=0.8)
    for place, pair in enumerate(pairs):
        row = rows[pair]
        axes.plot(row.seeds, [place + 0.27] * len(row.seeds), "o", color=SEED, markersize=3.5, alpha=0.75)
        if row.estimate.low is not None:
            axes.plot([row.estimate.low, row.estimate.high], [place, place], "-", color=MEAN, linewidth=2)
        if row.estimate.mean is not None:
            axes.plot([row.estimate.mean], [place], "D", color=MEAN, markersize=5)
    axes.set_yticks(range(len(pairs)), [f"{b} - {a}" for b, a in pairs])
    axes.set_ylim(max(1, len(pairs)) - 0.5, -0.5)
    has_interval = any(row.estimate.low is not None for row in rows.values())
    axes.set_title(f"difference in {COLUMNS[metric]}" + (", 95 % interval over tasks" if has_interval else ""))
    axes.grid(axis="x", color=LINE, alpha=0.3)
