"""A canvas for the report's pictures: matplotlib's figure as inline SVG in the page's own colours and font.

Colours are the page's CSS variables, so that one picture fits light and dark; the text stays text. Knows no chart and
no data; matplotlib is imported when the first picture is drawn.
"""

from __future__ import annotations

import functools
import html
import io
import re
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec

# Stand-ins that matplotlib writes out as they are, and the CSS variable each becomes.
INK, SOFT, LINE, PAPER, ON = "#000001", "#000002", "#000003", "#000004", "#000005"
SERIES = tuple(f"#0000a{index}" for index in range(1, 7))
GREY = "#0000a7"
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", PAPER: "paper", ON: "on", GREY: "grey"}
_VARIABLES |= {colour: f"c{index}" for index, colour in enumerate(SERIES, 1)}

OWN = "\ue000"  # before every id of a picture; whoever puts several on a page replaces it by something of each
WIDTH = 440  # pixels; a phone shows it at four fifths
FONT = 12.0
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "coalign",
    "text.parse_math": False,
    "font.size": FONT,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}

_P = ParamSpec("_P")


def styled(draw: Callable[_P, str]) -> Callable[_P, str]:
    """Let a picture be drawn in our style, and leave matplotlib's settings as they were."""

    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> str:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def new_figure(height: float, left: float, right: float, bottom: float, top: float) -> tuple[Any, Any]:
    """Return a figure of WIDTH x height pixels and axes within these margins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    box = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - bottom - top) / height)
    return figure, figure.add_axes(box)


def to_svg(figure: Any, alt: str) -> str:
    """Return the figure as an SVG element: CSS variables for colours, no ids but those referred to, no namespaces."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    write: Any = FigureCanvasSVG(figure).print_svg
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has fonts for more scripts
        write(stream, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # matplotlib escapes < and > in labels, so that what stands between them is its own.
    text = re.sub(r"<[^>]*>", lambda tag: _plain_tag(tag[0]), text)
    text = re.sub(r"<defs>\s*</defs>|<g/>", "", text)
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", text))
    text = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{OWN}{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r"(url\(|href=\")#([\w-]+)", rf"\g<1>#{OWN}\g<2>", text)
    width, height = (round(size * 72) for size in figure.get_size_inches())
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    text = re.sub(r"<svg[^>]*>", lambda _: f'<svg {size} role="img" aria-label="{html.escape(alt)}">', text, count=1)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _plain_tag(tag: str) -> str:
    """Return a tag of matplotlib's with our variables for colours, the page's font and shorter numbers."""
    tag = re.sub(r"#0000(?:0[1-5]|a[1-7])\b", lambda found: f"var(--{_VARIABLES[found[0]]})", tag)
    tag = re.sub(r" ?font-family: [^;\"]*;?", "", tag)
    tag = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), tag)
    return tag.replace("xlink:href", "href").replace(' transform="rotate(-0 ', ' transform="rotate(0 ')
