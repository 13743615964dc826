"""The normal forms: the table of docs/data.md, and what holds for any text."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalign.answer_form import COUNTED, counted_in, normalise_answer, read_answer_map
from coalign.text import loose_key, normalise_input, tokens, words

DOCS = Path(__file__).resolve().parents[2] / "docs" / "data.md"
SPAN = re.compile(r"(`+) ?(.+?) ?\1(?!`)")
SIGNS = (
    " \n\t.,;:!?'\"`*_()[]{}<>+-−–’“”«»「」。！，．।؟²₂½ａＡ１０,१ๆีกำ不是ßﬁµ\u0301\u0323\u200b\u200d\u00a0\u202f…ΣςİıŉK"
)
TEXTS = st.one_of(st.text(), st.text("aBn01" + SIGNS, max_size=12), st.text("1,0 ()", max_size=9))
FORMS = st.sampled_from([(), ("case",), ("space",), ("numbers",), COUNTED])


def code_spans(cell: str) -> list[str]:
    return [
        re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), s.replace(r"\n", "\n")) for _, s in SPAN.findall(cell)
    ]


def rows_of_docs() -> list[list[list[str]]]:
    """Return the table of docs/data.md: rows of the code spans in its three cells."""
    section = DOCS.read_text(encoding="utf-8").partition("| answer | equal to | other answers |\n")[2]
    lines = section.partition("\n\n")[0].splitlines()[1:]
    return [[code_spans(cell) for cell in line.strip("| ").split(" | ")] for line in lines]


@pytest.mark.parametrize("row", rows_of_docs(), ids=lambda row: row[0][0])
def test_answers_compare_as_the_table_says(row: list[list[str]]) -> None:
    (answer,), equal, other = row
    assert equal and other
    assert [text for text in equal if normalise_answer(text) != normalise_answer(answer)] == []
    assert [text for text in other if normalise_answer(text) == normalise_answer(answer)] == []


@settings(max_examples=400, deadline=None)
@given(TEXTS, FORMS)
def test_the_form_of_a_form_is_itself(text: str, form: tuple[str, ...]) -> None:
    once = normalise_answer(text, form)
    assert normalise_answer(once, form) == once
    assert normalise_input(normalise_input(text)) == normalise_input(text)


@settings(max_examples=400, deadline=None)
@given(TEXTS, FORMS)
def test_composition_does_not_matter(text: str, form: tuple[str, ...]) -> None:
    composed, apart = (unicodedata.normalize(name, text) for name in ("NFC", "NFD"))
    for function in (lambda t: normalise_answer(t, form), normalise_input, words, tokens):
        assert function(composed) == function(apart)


@settings(max_examples=300, deadline=None)
@given(st.text("aBz019 .,!?'\"()[]<>-+*", max_size=12))
def test_width_does_not_matter(text: str) -> None:
    wide = "".join("\u3000" if c == " " else chr(ord(c) + 0xFEE0) for c in text)
    assert normalise_answer(wide) == normalise_answer(text)
    assert words(wide) == words(text) and tokens(wide) == tokens(text)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_what_counts_only_tells_more_apart(one: str, other: str) -> None:
    """Texts that are equal although everything counts are equal when nothing does."""
    if normalise_answer(one, COUNTED) == normalise_answer(other, COUNTED):
        assert normalise_answer(one) == normalise_answer(other)


def test_settings_tell_more_apart() -> None:
    for form, one, other in (("case", "MW", "mW"), ("space", "a\nb", "a b"), ("numbers", "1,000", "1000")):
        assert normalise_answer(one) == normalise_answer(other)
        assert normalise_answer(one, (form,)) != normalise_answer(other, (form,))
        assert normalise_answer(f"**{one}.**", (form,)) == normalise_answer(one, (form,))


@pytest.mark.parametrize(
    ("texts", "counted"),
    [
        (["mW", "MW"], ("case",)),
        (["5 mg", "5 Mg"], ("case",)),
        (["pH", "PH"], ("case",)),
        (["AA", "Aa", "aa"], ("case",)),
        (["x", "X", "y"], ("case",)),
        (["Positive", "positive.", "positive", "POSITIVE"], ()),
        (["Yes", "yes", "YES", "No", "no"], ()),
        (["New York", "new york", "New york"], ()),
        (["Vitamin A", "vitamin a"], ()),
        (["a\nb", "a b"], ("space",)),
        (["if a:\n  b\nc", "if a:\n  b\n  c"], ("space",)),
        (["a  b", "a b", "a b "], ()),
        (["x\ny", "x\ny\n", "x \ny"], ()),
        (["<42", ">42"], ()),
    ],
)
def test_what_counts_is_told_from_answers_that_differ_by_nothing_else(
    texts: list[str], counted: tuple[str, ...]
) -> None:
    assert counted_in(texts) == counted_in(texts[::-1]) == counted


def test_inputs_are_strict() -> None:
    same = [("e\u0301a", "\u00e9a"), ("a\r\nb", "a\nb\n"), (" a ", "a"), ("\n\n  a\n  b", "  a\n  b\n\n")]
    apart = [
        ("2² = ?", "22 = ?"),
        ("a", "A"),
        ("a", "a."),
        ("  a\nb", "a\nb"),
        ("a  b", "a b"),
        ("ａ", "a"),
        ("a\nb", "a b"),
    ]
    assert all(normalise_input(one) == normalise_input(other) for one, other in same)
    assert all(normalise_input(one) != normalise_input(other) for one, other in apart)
    assert loose_key("2² = ?") == loose_key("22  =  ?"), "nearly equal inputs share a split"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("हिंदी में", ["हिंदी", "में"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("天气很好。", ["天", "气", "很", "好"]),
        ("日本語のテキスト 2023年", [*"日本語のテキスト", "2023", "年"]),
        ("مَرْحَبًا بِكَ", ["مَرْحَبًا", "بِكَ"]),
        ("안녕하세요 세계", ["안녕하세요", "세계"]),
        ("Tiếng Việt", ["tiếng", "việt"]),
        ("ສະບາຍດີ", ["ສ", "ະ", "ບ", "າ", "ຍ", "ດີ"]),
        ("ខ្មែរ", ["ខ្", "មែ", "រ"]),
        ("GPT-4很好", ["gpt", "4", "很", "好"]),
        ("ok 👍🏽", ["ok", "👍🏽"]),
        ("naïve café", ["naïve", "café"]),
    ],
)
def test_words_of_many_scripts(text: str, found: list[str]) -> None:
    assert words(text) == tokens(text) == found


@given(st.text(st.characters(codec="ascii")))
def test_english_words_are_runs_of_letters_and_digits(text: str) -> None:
    assert words(text) == re.findall(r"\w+(?:'\w+)*", text.lower())
    assert tokens(text) == re.findall(r"[a-z0-9]+", text.lower())


def test_an_answer_map_tells_its_own_labels_apart() -> None:
    units = read_answer_map((("mW", "milliwatt"), ("MW", "megawatt")))
    assert units is not None and units.word("MW") == "megawatt" and units.canonical("Milliwatt.") == "mW"
    spellings = read_answer_map((("yes", "good"), ("Yes", "good"), ("no", "bad")))
    assert spellings is not None and spellings.word("YES") == "good" and spellings.canonical("no") is None
    assert read_answer_map((("yes", "good"), ("no", "Good."))) is None
