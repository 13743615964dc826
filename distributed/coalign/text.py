"""Texts: the strict normal form of inputs, loose keys, words in any script, and hashes.

Data, rewards and metrics compare texts by these and by answer_form.py, so that they agree. Knows no records.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from itertools import groupby

from coalign.answer_form import AnswerForm as AnswerForm
from coalign.answer_form import normalise_answer as normalise_answer
from coalign.answer_form import plain_text

# Scripts that write no space between words: each character is a unit. Thai, Lao, Myanmar, Khmer, Tai, kana, Han.
UNSPACED = (
    "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6\u0edc-\u0edf\u1000-\u103f\u1050-\u108f"
    "\u1780-\u17d3\u1950-\u19cf\u1a20-\u1a7f\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaaff\uf900-\ufaff\U0001b000-\U0001b16f"
    "\U00020000-\U0003ffff"
)
_EMOJI = "\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001f3fa\U0001f400-\U0001faff"
_SPACELESS = re.compile(f"[{UNSPACED}]")
_ASCII_WORD, _ASCII_TOKEN = re.compile(r"\w+(?:'\w+)*"), re.compile(r"[^\W_]+")


def normalise_input(text: str) -> str:
    """Return an input's identity, in which everything counts that may change its meaning.

    Unicode NFC, line ends as \\n, no blank lines or white space around it; a text of one line isn't indented.
    """
    composed = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    bare = composed.strip()
    return re.sub(r"^(?:[^\S\n]*\n)+", "", composed).rstrip() if "\n" in bare else bare


def loose_key(text: str) -> str:
    """Return a key that texts of nearly the same characters share, which must not be divided among splits.

    Unicode NFKC, case folded, runs of white space as one space.
    """
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def words(text: str) -> list[str]:
    """Return the words of a text, case folded, without punctuation; a character each of an unspaced script; emoji."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return (_ASCII_WORD if folded.isascii() else _patterns()[0]).findall(folded)


def num_unspaced(text: str) -> int:
    """Return how many characters are of a script that writes no spaces, each with its marks as one."""
    return 0 if text.isascii() else len(_SPACELESS.findall(text))


def tokens(text: str) -> list[str]:
    """Return the tokens of ROUGE: in ASCII those of rouge-score, runs of letters and digits; else as `words`."""
    lower = text.lower()
    if lower.isascii():
        return _ASCII_TOKEN.findall(lower)
    return _patterns()[1].findall(plain_text(lower))


@functools.cache
def combining_marks() -> str:
    """Return the combining marks of all scripts as the inside of a regular expression's class."""
    marks = [
        c for c in range(0x300, 0xE01F0) if (c < 0x1EB00 or c >= 0xE0100) and unicodedata.category(chr(c))[0] == "M"
    ]
    runs = [[c for _, c in run] for _, run in groupby(enumerate(marks), lambda pair: pair[1] - pair[0])]
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs) + "\u200c\u200d\U0001f3fb-\U0001f3ff"


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return the patterns of a word and of a token of ROUGE beyond ASCII."""
    marks = combining_marks()
    single = f"[{UNSPACED}{_EMOJI}][{marks}]*"
    word, token = (f"(?:[^\\W{other}{UNSPACED}][{marks}]*)+" for other in ("", "_"))
    return re.compile(f"{single}|{word}(?:['’]{word})*"), re.compile(f"{single}|{token}")


def unit_hash(*parts: str) -> float:
    """Return a number in [0, 1) that depends on nothing but `parts` (SHA-256)."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
