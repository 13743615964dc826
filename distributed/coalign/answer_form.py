"""The normal form of answers: two answers are equal when their normal forms are. docs/data.md shows it by examples.

Needs the standard library alone: examples/lm_eval/make_task.py writes this source into its scoring file.
"""

from __future__ import annotations

import functools
import itertools
import re
import textwrap
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

AnswerForm = tuple[str, ...]  # which of COUNTED count when the answers of a task are compared
COUNTED = ("case", "space", "numbers")  # white space; and how a number is written: 1,000 or 1000

# Nothing to see: soft hyphen, zero-width characters, marks of direction, selectors of a presentation.
_UNSEEN = dict.fromkeys(
    [0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFE0E, 0xFE0F, 0xFEFF]
)
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛ʼ′", "'"),
        **dict.fromkeys("“”„‟″〝〞〟", '"'),
        **dict.fromkeys("‐‑‒–−", "-"),
        **dict.fromkeys(("\r", "\x85", "\u2028", "\u2029"), "\n"),
    }
)
# Other shapes of the same characters. Superscripts, fractions, circled and mathematical letters mean more than a shape.
_SHAPES = {"<wide>", "<narrow>", "<small>", "<vertical>", "<compat>", "<initial>", "<medial>", "<final>", "<isolated>"}

_QUOTES = {'"': '"', "'": "'", "«": "»", "»": "«", "‹": "›", "「": "」", "『": "』", "《": "》", "〈": "〉"}
_MARKUP = ("***", "**", "``", "`")
_FENCED = re.compile(r"```[\w+#.-]*\n(.*?)\n?```", re.DOTALL)
_IN_BRACKETS = re.compile(r"\(([^\s(),;:\[\]{}]+)\)|([^\W_]{1,2})\)")
_LEAD = re.compile(r"[¡¿]+\s*(?=\w)|[.,;:*•]+\s+")
_STOPS = ".,;:。、।॥،؛۔։།።፣။၊។៕"
_CALLS = "!?؟"
_WORD_AT_END = re.compile(r"(?<![\w.'])(?:[^\W\d_]{3,}|[^\W\d_]{2,}'[^\W\d_]+)[\"'»)]?$")
_THOUSANDS = re.compile(r"(?<![\w.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9]|\.[0-9]*,)")
_SPACED_THOUSANDS = re.compile(r"(?<![\w.,])[1-9][0-9]{0,2}(?:[\u00a0\u2009\u202f][0-9]{3})+(?![0-9])")
_SIMPLE = re.compile(r"[A-Za-z0-9]+(?: [A-Za-z0-9]+)*")


def normalise_answer(text: str, form: AnswerForm = ()) -> str:
    """Return an answer's identity, which ignores how it is dressed: case, white space, quotes, markup, full stops.

    `form` names what counts all the same. A text of punctuation alone keeps it. The result is its own normal form.
    """
    if _SIMPLE.fullmatch(text):
        return text if "case" in form else text.lower()
    plain = plain_text(text).replace("\r\n", "\n").translate(_SIGNS)
    if "case" not in form:
        plain = _composed(unicodedata.normalize("NFD", plain).casefold())
    numbers = "numbers" not in form
    if numbers:
        plain = _SPACED_THOUSANDS.sub(lambda match: re.sub(r"\s", "", match[0]), plain)
    if fenced := _FENCED.fullmatch(plain.strip()):
        plain = plain if "```" in fenced[1] or not fenced[1].strip() else fenced[1]
    while True:
        bare = _without_edges(_with_spaces(plain, "space" in form))
        if bare == plain:
            break
        plain = bare
    if numbers and "," in bare and not re.search(r"[()\[\]{}]", bare):
        bare = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), bare)
    return bare


def plain_text(text: str) -> str:
    """Return a text in NFC without characters that can't be seen, and other shapes of a character as itself."""
    if text.isascii():
        return text
    return _composed("".join(map(_plain_character, _composed(text.translate(_UNSEEN)))))


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


@functools.lru_cache(maxsize=4096)
def _plain_character(character: str) -> str:
    if unicodedata.decomposition(character).partition(" ")[0] not in _SHAPES or character.translate(_SIGNS) in "'\"-":
        return character
    plain = unicodedata.normalize("NFKC", character)
    return character if plain[0].isspace() else plain  # a space, or an accent alone


def _with_spaces(text: str, all_count: bool) -> str:
    """Return a text with single spaces; lines stay where one of them is indented, as code is."""
    if "\n" not in text and not all_count:
        return " ".join(text.split())
    lines = [re.sub(r"[^\S\n\t]", " ", line).rstrip() for line in text.split("\n")]
    lines = textwrap.dedent("\n".join(lines)).strip("\n").split("\n")
    if all_count:
        return "\n".join(lines).strip() if len(lines) == 1 else "\n".join(lines)
    lines = [line.expandtabs(4) for line in lines if line]
    if not any(line.startswith(" ") for line in lines):
        return " ".join(" ".join(lines).split())
    return "\n".join(" " * (len(line) - len(line.lstrip())) + " ".join(line.split()) for line in lines)


def _without_edges(text: str) -> str:
    """Return a text without one pair around the whole, or without the punctuation of a sentence."""
    inner = text[1:-1]
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1]:
        free = re.sub(r"(?<=\w)'(?=\w)", "", inner) if text[0] == "'" else inner
        if inner.strip() and text[0] not in free and text[-1] not in free:
            return inner
    for mark in _MARKUP:
        if text.startswith(mark) and text.endswith(mark) and len(text) > 2 * len(mark):
            inner = text[len(mark) : -len(mark)]
            if mark not in inner and not {inner[0], inner[-1]} & {mark[0], " ", "\n", "/"}:
                return inner
    token = _IN_BRACKETS.fullmatch(text)
    if token and any(map(str.isalnum, token[0])):
        return token[1] or token[2]
    return _without_punctuation(text)


def _without_punctuation(text: str) -> str:
    lead = _LEAD.match(text)
    if lead and _has_content(text[lead.end() :]):
        return text[lead.end() :]
    stopped = text.rstrip(_STOPS)
    if stopped != text and not stopped.endswith(("/", "\\")) and _has_content(stopped):  # ../.. is a path
        return stopped
    called = text.rstrip(_CALLS).rstrip()
    # 5! and n! are factorials, and a name may end in a mark; a word or a character of an unspaced text is called out.
    if called != text and (_WORD_AT_END.search(called) or _ends_without_case(called)):
        return called
    return text


def _has_content(text: str) -> bool:
    return any(unicodedata.category(character)[0] not in "PZC" for character in text)


def _ends_without_case(text: str) -> bool:
    """Return whether a text ends in a letter of a script without case, such as Han or Devanagari."""
    ends = (unicodedata.category(character) for character in reversed(text))
    return next((category for category in ends if category[0] != "M"), "") == "Lo"


# What counts in a set of answers


def counted_in(texts: Iterable[str]) -> AnswerForm:
    """Return which of "case" and "space" count among answers: those by which some answers differ and nothing else.

    A capital at the beginning of a word, or capitals throughout, say nothing: Yes, yes and YES are one answer. Nor does
    white space within a line.
    """
    plain_texts = {plain_text(text) for text in texts}
    if len({" ".join(plain.casefold().split()) for plain in plain_texts}) == len(plain_texts):
        return ()
    alike: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for plain in plain_texts:
        flat = " ".join(plain.split())
        alike[flat.casefold()][flat].add(plain)
    counted = set()
    for by_case in alike.values():
        if any(_differ_as_symbols(one, other) for one, other in itertools.combinations(sorted(by_case), 2)):
            counted.add("case")
        if any(len(set(map(_lines, found))) > 1 for found in by_case.values() if any("\n" in text for text in found)):
            counted.add("space")
    return tuple(name for name in COUNTED if name in counted)


def _lines(text: str) -> str:
    return re.sub(r"(?<=\S)[^\S\n]+", " ", normalise_answer(text, ("case", "space")))


def _differ_as_symbols(one: str, other: str) -> bool:
    """Return whether two texts that are equal but for case differ in a symbol, such as mW and MW."""
    words = list(zip(*(re.findall(r"[^\W\d_]+", text) for text in (one, other)), strict=False))
    has_digits = re.search(r"\d", one) is not None
    short = has_digits or all(len(word) < 3 for word, _ in words)
    return any(a != b and _is_symbol(a, b, short, has_digits) for a, b in words)


def _is_symbol(a: str, b: str, short: bool, has_digits: bool) -> bool:
    """Return whether a word whose case differs is a symbol; in a `short` text a letter alone is one."""
    if len(a) < 3 and has_digits:
        return True
    if len(a) == 1:
        return short
    if len(a) == 2:
        return not (a.islower() or b.islower()) or not (_is_plain(a) and _is_plain(b))
    return not (_is_plain(a) or _is_plain(b))


def _is_plain(word: str) -> bool:
    return word.islower() or word.isupper() or word.istitle()


# Answers in the words of a wording


class AnswerMap(NamedTuple):
    """The words in which a wording wants its answers, on one input, both ways: by the normal form of label and of word.

    What counts in labels, and in words, is what they differ by and nothing else.
    """

    words: dict[str, str]
    labels: dict[str, str]
    of_labels: AnswerForm
    of_words: AnswerForm

    def canonical(self, said: str) -> str | None:
        """Return the label of a word; None for a label, which wasn't asked for; anything else as it is."""
        key = normalise_answer(said, self.of_words)
        if key in self.labels:
            return self.labels[key]
        return None if normalise_answer(said, self.of_labels) in self.words else said

    def word(self, label: str) -> str | None:
        """Return the word of a label, None for one that the map lacks."""
        return self.words.get(normalise_answer(label, self.of_labels))


@functools.lru_cache(maxsize=1024)
def read_answer_map(pairs: tuple[tuple[str, str], ...]) -> AnswerMap | None:
    """Return the map of (label, word) pairs; None when two labels have the same word."""
    of_labels, of_words = counted_in(label for label, _ in pairs), counted_in(word for _, word in pairs)
    by_label = {normalise_answer(label, of_labels): (label, word) for label, word in pairs}
    labels = {normalise_answer(word, of_words): label for label, word in by_label.values()}
    if len(labels) < len(by_label):
        return None
    return AnswerMap({key: word for key, (_, word) in by_label.items()}, labels, of_labels, of_words)
