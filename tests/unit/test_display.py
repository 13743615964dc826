"""Texts as a terminal, a page of Markdown and a shell take them."""

from __future__ import annotations

import logging
import re
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalign.display import code_span, from_markdown, markdown, on_one_line, printable, shell_line
from coalign.failures import as_line
from coalign.recipe import set_up_logging

NASTY = "\x1b]0;x\x07\r\x9b2J\u202eevil\u2066\ud800\u2028"


def test_what_a_terminal_obeys_is_shown_as_escapes() -> None:
    shown = printable(NASTY)
    assert shown == r"\x1b]0;x\x07\x0d\x9b2J\u202eevil\u2066\ud800\u2028"
    assert printable("été, 日本, हिंदी, 👩‍👩‍👧, a\tb\n") == "été, 日本, हिंदी, 👩‍👩‍👧, a\tb\n"
    assert on_one_line("a\tb\n") == r"a\tb\n"
    assert as_line(f"a\n b{NASTY}").isprintable()


def test_log_shows_no_escape_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    logging.getLogger("coalign").info("answer %s", "\x1b[31mred\u202e")
    assert r"answer \x1b[31mred\u202e" in capsys.readouterr().out


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_printable_text_stays_and_the_rest_can_be_printed(text: str) -> None:
    shown = on_one_line(text)
    shown.encode()
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    if text.isprintable():
        assert shown == text


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(min_codepoint=32, exclude_categories=["Cc", "Cs", "Cf", "Zl", "Zp"])))
def test_markdown_is_undone(text: str) -> None:
    assert from_markdown(markdown(text)) == on_one_line(text)


def test_markdown_takes_nothing_for_markup() -> None:
    text = "a|b <b>*x*</b> [l](u) `c` _i_ snake_case & \n# h"
    assert markdown(text) == r"a\|b &lt;b&gt;\*x\*&lt;/b&gt; \[l\](u) \`c\` \_i\_ snake_case &amp; \\n# h"


@pytest.mark.parametrize(
    ("text", "span"), [("a", "`a`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("a|b", r"`a\|b`"), ("a\nb", r"`a\nb`")]
)
def test_code_span(text: str, span: str) -> None:
    assert code_span(text) == span


def test_command_line_is_what_bash_reads_back() -> None:
    words = ["plain", "two words", "it's", "line\nbreak\t\x1b'\\", "$x"]
    line = shell_line(words)
    assert "\n" not in line
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == words
