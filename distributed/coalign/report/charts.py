"""Pictures of the report: dots with intervals, arrows, stacked bars, strips, columns, curves.

Knows plain labels and numbers, nothing of a run.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from coalign.report.svg import FONT, GREY, INK, LINE, ON, PAPER, SERIES, SOFT, WIDTH, new_figure, styled, to_svg

MAX_ROWS = 24  # of a chart with a row per task
MAX_DOTS = 40  # of a row
_LETTER = 7.3  # pixels of a letter of the size FONT, about
_ROW = 22


@dataclasses.dataclass(frozen=True, slots=True)
class Dot:
    """A row of `interval_dots`: a mean, its interval where there is one, and floors marked on the same line."""

    label: str
    mean: float | None
    low: float | None = None
    high: float | None = None
    colour: str = GREY
    floors: tuple[float | None, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Arrow:
    """A task's move from (x, y) to (x, y)."""

    label: str
    start: tuple[float, float]
    end: tuple[float, float]

    def length(self) -> float:
        """Return how far it moved, in both directions together."""
        return abs(self.end[0] - self.start[0]) + abs(self.end[1] - self.start[1])


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """A named line of `curves`."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    dots: bool = False


def plain(text: str, limit: int = 26) -> str:
    """Return a label of one line without control characters, cut with an ellipsis."""
    line = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def told_apart(texts: Iterable[str], limit: int = 26) -> dict[str, str]:
    """Return {text: its label in a picture}: where several would be cut to the same they are cut in the middle.

    Those that only differ there are numbered.
    """
    texts = list(dict.fromkeys(texts))
    labels = {text: plain(text, limit) for text in texts}
    for cut in (_cut_in_the_middle, lambda text, limit: f"{plain(text, limit - 4)} {texts.index(text) + 1}"):
        times = Counter(labels.values())
        labels |= {text: cut(text, limit) for text, label in labels.items() if times[label] > 1}
    return labels


def _cut_in_the_middle(text: str, limit: int) -> str:
    line = plain(text, len(text))
    return line if len(line) <= limit else f"{line[: limit // 2]}…{line[-((limit - 1) // 2) :]}"


def colour_of(index: int, count: int) -> str:
    """Return the colour of a model by its place: grey for the first of several, blue for the last."""
    if count > 1 and index == 0:
        return GREY
    return SERIES[0] if index == count - 1 else SERIES[1 + (index - 1) % (len(SERIES) - 1)]


@styled
def interval_dots(rows: Sequence[Dot], alt: str, *, floors: Sequence[str] = (), signed: bool = False) -> str:
    """Draw a row per dot: its interval, the value beside it, and small marks for the floors."""
    labels = told_apart(row.label for row in rows)
    left = _left_of(labels)
    figure, axes = new_figure(
        _ROW * len(rows) + 42 + 16 * bool(floors), left, right=92, bottom=30 + 16 * bool(floors), top=10
    )
    values = [v for row in rows for v in (row.mean, row.low, row.high, *row.floors) if v is not None]
    low, high = (min([0.0, *values]), max([0.0, *values])) if signed else (min([0.0, *values]), max([1.0, *values]))
    space = 0.03 * (high - low or 1.0)
    axes.set_xlim(low - space, high + space)
    for place, row in enumerate(rows):
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [place, place], color=row.colour, linewidth=3, solid_capstyle="round")
        for value, marker, size in zip(row.floors, ("D", "s"), (5, 10), strict=False):  # one shows within the other
            if value is not None:
                axes.plot([value], [place], marker, markersize=size, markerfacecolor="none", markeredgecolor=SOFT)
        if row.mean is not None:
            axes.plot([row.mean], [place], "o", color=row.colour, markersize=9, markeredgecolor=PAPER)
        text = "–" if row.mean is None else f"{row.mean:+.3f}" if signed else f"{row.mean:.3f}"
        axes.annotate(text, (1.0, place), (10, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                      va="center", color=INK, weight="bold")  # fmt: skip
    if signed:
        axes.axvline(0.0, color=SOFT, linewidth=1)
    _rows_of(axes, [labels[row.label] for row in rows])
    if floors:
        named = "   ".join(f"{mark} {name}" for mark, name in zip("◇□", floors, strict=False))
        figure.text(0.0, 8 / figure.get_figheight() / 72, named, color=SOFT, size=FONT - 1)
    return to_svg(figure, alt)


@styled
def arrows(moves: Sequence[Arrow], labels: tuple[str, str], alt: str, num_labels: int = 6) -> str:
    """Draw each move as an arrow, or a ring where nothing moved; the longest ones carry their name."""
    figure, axes = new_figure(400, left=52, right=16, bottom=46, top=10)
    points = [point for move in moves for point in (move.start, move.end)]
    for index, limit in enumerate((axes.set_xlim, axes.set_ylim)):
        high = max((point[index] for point in points), default=1.0)
        low = min((point[index] for point in points), default=0.0)
        limit(min(0.0, low) - 0.03, min(1.0, max(0.25, high * 1.12)) + 0.03)
    axes.set_aspect("auto")
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    ranked = sorted(moves, key=Arrow.length, reverse=True)
    for move in ranked:
        up = move.end[1] >= move.start[1]
        colour = SERIES[0] if up else SERIES[1]
        if move.start == move.end:
            axes.plot(*move.end, "o", markerfacecolor="none", markeredgecolor=SOFT, markersize=7)
            continue
        axes.plot(*move.start, "o", color=GREY, markersize=4)
        axes.annotate("", move.end, move.start,
                      arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 2, "shrinkB": 0,
                                  "mutation_scale": 11, "linestyle": "-" if up else (0, (4, 1.5))})  # fmt: skip
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    _name_some(figure, axes, [move for move in ranked if move.start != move.end][:num_labels])
    return to_svg(figure, alt)


def _name_some(figure: Any, axes: Any, moves: Sequence[Arrow]) -> None:
    """Write names beside arrow heads, those only that cover no other name and stay inside."""
    taken: list[tuple[float, float, float, float]] = []
    labels = told_apart((move.label for move in moves), 22)
    width, height = figure.get_size_inches() * 72
    for move in moves:
        name = labels[move.label]
        x, y = axes.transData.transform(move.end) * 72 / figure.dpi
        wide = _LETTER * 0.93 * len(name)
        for dx, dy, anchor in ((8, 4, "left"), (-8, 4, "right"), (8, -12, "left"), (-8, -12, "right")):
            box = (x + dx - (wide if anchor == "right" else 0), y + dy, wide, FONT)
            inside = box[0] > 52 and box[0] + wide < width - 4 and 46 < box[1] < height - 44
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                axes.annotate(name, move.end, (dx, dy), textcoords="offset points", ha=anchor, size=FONT - 1)
                break


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] + 2 and b[1] < a[1] + a[3] + 2


@styled
def stacked_bars(rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[tuple[str, str]], alt: str) -> str:
    """Draw the shares that the parts (name, colour) of each row have in its sum, with the percentage where it fits."""
    labels = told_apart(label for label, _ in rows)
    left = _left_of(labels)
    legend = _legend_lines([name for name, _ in parts])
    bottom = 14 + 18 * len(legend)
    figure, axes = new_figure(_ROW * len(rows) + 10 + bottom, left, right=14, bottom=bottom, top=10)
    inner = WIDTH - left - 14
    for place, (_, values) in enumerate(rows):
        total, start = sum(values), 0.0
        for value, (_, colour) in zip(values, parts, strict=True):
            share = value / total if total else 0.0
            axes.barh(place, share, left=start, height=0.72, color=colour, edgecolor=PAPER, linewidth=1)
            if share * inner > 30:
                axes.text(start + share / 2, place, f"{100 * share:.0f} %", ha="center", va="center", color=ON,
                          size=FONT - 1)  # fmt: skip
            start += share
    axes.set_xlim(0, 1)
    _rows_of(axes, [labels[label] for label, _ in rows])
    axes.set_xticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    _draw_legend(figure, legend, dict(parts))
    return to_svg(figure, alt)


def _legend_lines(names: Sequence[str]) -> list[list[str]]:
    lines: list[list[str]] = [[]]
    for name in names:
        if lines[-1] and _LETTER * sum(len(one) + 4 for one in (*lines[-1], name)) > WIDTH:
            lines.append([])
        lines[-1].append(name)
    return lines


def _draw_legend(figure: Any, lines: Sequence[Sequence[str]], colours: dict[str, str]) -> None:
    height = figure.get_figheight() * 72
    for number, names in enumerate(lines):
        x, y = 2.0, 6 + 18 * (len(lines) - 1 - number)
        for name in names:
            figure.text(x / WIDTH, y / height, "■", color=colours[name], size=FONT)
            figure.text((x + 14) / WIDTH, y / height, name, color=SOFT, size=FONT - 1)
            x += 24 + _LETTER * len(name)


@styled
def strips(rows: Sequence[tuple[str, Sequence[float]]], alt: str, colour: str = SERIES[0]) -> str:
    """Draw each row's values as dots on a line from the lowest to the highest, the mean as a bar across it.

    Of more than MAX_DOTS values, MAX_DOTS quantiles are drawn.
    """
    labels = told_apart(label for label, _ in rows)
    left = _left_of(labels)
    figure, axes = new_figure(_ROW * len(rows) + 44, left, right=18, bottom=34, top=10)
    axes.set_xlim(-0.03, 1.03)
    for place, (_, values) in enumerate(rows):
        axes.plot([min(values), max(values)], [place, place], color=LINE, linewidth=4, solid_capstyle="round")
        dots = quantiles(values)
        axes.plot(dots, [place] * len(dots), "o", color=colour, markersize=6, alpha=0.75, markeredgecolor=PAPER)
        mean = sum(values) / len(values)
        axes.plot([mean, mean], [place - 0.32, place + 0.32], color=INK, linewidth=1.6)
    _rows_of(axes, [labels[label] for label, _ in rows])
    return to_svg(figure, alt)


def quantiles(values: Sequence[float], limit: int = MAX_DOTS) -> list[float]:
    """Return the values in order; of too many, `limit` at equal distances with the lowest and the highest."""
    ordered = sorted(values)
    if len(ordered) <= limit:
        return ordered
    return [ordered[round(place * (len(ordered) - 1) / (limit - 1))] for place in range(limit)]


@styled
def columns(values: Sequence[tuple[str, float]], label: str, alt: str) -> str:
    """Draw a column for each named value, the value on top."""
    figure, axes = new_figure(230, left=16, right=16, bottom=46, top=22)
    places, labels = range(len(values)), told_apart((name for name, _ in values), 10)
    axes.bar(places, [value for _, value in values], color=SERIES[0], width=0.7)
    for place, (_, value) in zip(places, values, strict=True):
        axes.annotate(f"{value:,.0f}", (place, value), (0, 3), textcoords="offset points", ha="center", size=FONT - 1)
    axes.set_xticks(list(places), [labels[name] for name, _ in values])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label)
    return to_svg(figure, alt)


@styled
def curves(lines: Sequence[Curve], alt: str, label: str = "update") -> str:
    """Draw lines over the updates, each with its name at its end."""
    wide = _LETTER * max((len(line.name) for line in lines), default=0) if len(lines) > 1 else 0
    figure, axes = new_figure(230, left=58, right=16 + wide, bottom=42, top=10)
    for line in lines:
        axes.plot(line.xs, line.ys, "-o" if line.dots else "-", color=line.colour, linewidth=1.8, markersize=4)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    axes.yaxis.get_major_locator().set_params(nbins=5)
    axes.set_xlabel(label)
    if len(lines) > 1:
        _name_ends(axes, lines)
    return to_svg(figure, alt)


def _name_ends(axes: Any, lines: Sequence[Curve]) -> None:
    """Write each line's name at its right end, moved up where two would cover each other."""
    low, high = axes.get_ylim()
    gap = 0.09 * (high - low)
    below = low - gap
    for line in sorted(lines, key=lambda one: one.ys[-1]):
        below = max(line.ys[-1], below + gap)
        axes.annotate(line.name, (1.0, below), (5, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                      va="center", color=line.colour, size=FONT - 1)  # fmt: skip


def _left_of(labels: dict[str, str]) -> float:
    return 14 + _LETTER * max(map(len, labels.values()), default=0)


def _rows_of(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
