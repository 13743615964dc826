"""Texts of data, models and settings as a terminal or a page of Markdown may show them.

Knows neither records nor files.
"""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterable

# Control characters but tab and line feed, line and paragraph separators, marks that turn the direction of text, and
# halves of surrogate pairs: a terminal obeys some, others hide what stands in a line, and the last can't be printed.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&]|(?<!\w)_|_(?!\w)")  # an underscore inside a word is no markup
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def has_control(text: str) -> bool:
    """Return whether a text holds a control character, a line break, or half of a surrogate pair."""
    return _CONTROL.search(text) is not None


def printable(text: str) -> str:
    r"""Return a text with control characters and marks of direction as escapes such as \x1b and \u202e."""
    return _UNSAFE.sub(lambda found: _escape(found.group()), text)


def on_one_line(text: str) -> str:
    r"""Return a text as `printable` does, with line feeds and tabs as \n and \t too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def markdown(text: str) -> str:
    """Return a text on one line of which Markdown and HTML take no character for markup, also within a table."""
    return _MARKDOWN.sub(lambda found: _ENTITIES.get(found.group(), f"\\{found.group()}"), on_one_line(text))


def from_markdown(text: str) -> str:
    """Return the text of which `markdown` has made this one."""
    return html.unescape(re.sub(r"\\([\\`*\[\]|~_])", r"\1", text))


def code_span(text: str) -> str:
    """Return a text on one line as Markdown's code, also within a table."""
    line = on_one_line(text)
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}".replace("|", "\\|")


def shell_line(words: Iterable[str]) -> str:
    """Return a command on one line: words with control characters are quoted as $'...', which bash reads back."""
    return " ".join(_shell_word(word) if on_one_line(word) != word else shlex.quote(word) for word in words)


def _shell_word(word: str) -> str:
    return "$'" + on_one_line(word.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
