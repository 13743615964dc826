"""A model's rewrites of an instruction: requested in several ways, extracted from its answers, and checked.

A rewrite is unusable when it is broken, too short or too long, or has lost something of the instruction. Pure functions
of texts. Knows no model.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from coalign.answer_form import plain_text
from coalign.config import ParaphraseTable
from coalign.process import derive_seed
from coalign.prompts import NUM_VARIANTS, paraphrase_prompt
from coalign.records import Row, Task
from coalign.text import UNSPACED, combining_marks, loose_key, words
from coalign.wordings.asking import PromptCodec
from coalign.wordings.near_repeats import NearRepeats, repeats

# An opening must mention the rewrite itself: "Here is a review, is it good or bad:" is an instruction.
_POLITENESS = r"(?:(?:sure|certainly|of course|absolutely|okay|ok)\b\s*[,.!:]*\s*)"
_ABOUT = r"\b(?:rewrit\w*|paraphras\w*|reword\w*|rephras\w*|(?:new|another|alternative|different) \w+)\b"
_HERE = rf"here(?:['’]s|\s+(?:is|are))\b[^\n:]{{0,60}}?(?:{_ABOUT}[^\n:]{{0,60}})|here (?:it is|is it|you go)"
_CAPTION = (
    r"(?:the |my |a |one |possible )?(?:rewritten|paraphrased|reworded|rephrased|new)"
    r" (?:instruction|version|text|wording)[^\n:]{0,30}|(?:instruction|paraphrase|rewrite|rewritten)\s*(?:\d{1,2})?"
)
_OPENING_INLINE = re.compile(rf"^{_POLITENESS}?(?:{_HERE}|{_CAPTION})\s*:\s*", re.IGNORECASE)
_POLITE = re.compile(r"^(?:sure|certainly|of course|absolutely|okay|ok)\s*[!.,]*$", re.IGNORECASE)
_NUMBERING = re.compile(r"^(?:\(?\d{1,2}[.):]|[-*•])\s+")
_EMPHASIS = re.compile(r"^(\*\*|__)(?P<inner>.+)\1$")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`"}

# Why a rewrite is dropped. filtering.py adds "longer_than_context", and files of wordings "unknown_task".
Reason = Literal[
    "empty",
    "cut_off",
    "malformed",
    "too_short",
    "too_long",
    "lost_label",
    "lost_number",
    "lost_placeholder",
    "lost_format",
    "held_out",
    "near_duplicate",
]
REASONS: tuple[str, ...] = get_args(Reason)

_EDGES = ".,;:!?\"'`()[]{}<>*_ "  # punctuation that a rewrite may leave out of what was quoted
_UNSPACED_EDGE = re.compile(f"^[{UNSPACED}]|[{UNSPACED}]$")
_ARABIC = re.compile("[\u0620-\u064a]")
_OPEN_END = re.compile(f"[{UNSPACED}\uac00-\ud7a3]$")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_PLACEHOLDER = re.compile(r"\{[^{}\n]{1,40}\}|<[^<>\s]{1,40}>|\[[A-Z][^\[\]\n]{0,40}\]")
_QUOTED = re.compile(r"\"([^\"\n]{1,60})\"|“([^”\n]{1,60})”|`([^`\n]{1,60})`|(?<!\w)['‘]([^'’\n]{1,60})['’](?!\w)")
# Bytes that no instruction has: control characters, and what a broken UTF-8 sequence decodes to.
_BROKEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")

# Constraints on the form of the answer: (how the original may put it, what a rewrite must then have).
_LIMIT = (
    r"\b(?:at most|at least|no more than|not more than|no fewer than|up to|fewer than|less than|maximum of|within)\b"
)
_UNIT = r"\b(?:words?|sentences?|characters?|letters?|lines?|items?|tokens?|digits?)\b"
_SAME = (
    r"\b(?:one|single|1)[- ]word\b|\bjust (?:one|a) word\b",
    r"\b(?:one|single|1)[- ]sentence\b",
    r"\b(?:full|complete) sentences?\b",
    r"\bcomma[- ]?separated\b|\bseparated (?:by|with) (?:a )?commas?\b|\bcommas? between\b|\bcomma[- ]delimited\b",
    r"\bupper[- ]?case\b|\bcapital letters?\b|\bcapitali[sz]ed?\b|\ball caps\b",
    r"\blower[- ]?case\b|\bsmall letters\b",
    r"\b(?:in|of) (?:the|this) (?:following )?form\b|\bformat(?:ted)?\b",
    r"\bjson\b",
    r"\bxml\b",
    r"\bhtml\b",
    r"\bmarkdown\b",
    r"\bsql\b",
    r"\bbullet(?:ed|s| points?| list)?\b|\bnumbered list\b",
    r"\balphabetical(?:ly)?\b|\balphabetic order\b",
    r"\b(?:without|no|omit|skip) (?:an? |any )?(?:explanations?|explaining|reasoning)\b",
)
_FORMATS = tuple(
    (re.compile(given, re.IGNORECASE), re.compile(needed, re.IGNORECASE | re.DOTALL))
    for given, needed in (
        *((pattern, pattern) for pattern in _SAME),
        (r"\byes\b\W+(?:(?:or|and)\W+)?no\b|\bno\b\W+(?:or|and)\W+yes\b", r"(?=.*\byes\b)(?=.*\bno\b)"),
        (r"\btrue\b\W+(?:(?:or|and)\W+)?false\b|\bfalse\b\W+(?:or|and)\W+true\b", r"(?=.*\btrue\b)(?=.*\bfalse\b)"),
        (
            rf"{_LIMIT}\W+\w+\W+{_UNIT}",
            rf"(?=.*{_UNIT}).*\b(?:most|least|more|fewer|less|up to|max\w*|min\w*|within|limit\w*)\b",
        ),
    )
)


def check_rewrite(
    original: str,
    rewrite: str,
    labels: Sequence[str],
    kept: Sequence[str],
    held_out: NearRepeats,
    table: ParaphraseTable,
) -> Reason | None:
    """Return why a rewrite of an instruction can't be used, None if it can.

    `kept` are the wordings that the task has already, `held_out` the dev and test wordings of all tasks. Both
    are without fields.
    """
    if not rewrite.strip():
        return "empty"
    length, asked = len(words(rewrite)), len(words(original))
    if not length or _BROKEN.search(rewrite):
        return "malformed"
    if length < table.min_length_ratio * asked:
        return "too_short"
    if length > table.max_length_ratio * max(asked, 1):
        return "too_long"
    if lost := _lost(original, rewrite, labels):
        return lost
    if held_out.has_like(rewrite):
        return "held_out"
    if repeats(rewrite, [original, *kept], table.max_similarity):
        return "near_duplicate"
    return None


def _lost(original: str, rewrite: str, labels: Sequence[str]) -> Reason | None:
    """Return the reason if the rewrite has lost something of the original."""
    if set(labels_in(original, labels)) - set(labels_in(rewrite, labels)):
        return "lost_label"
    if set(_NUMBER.findall(original)) - set(_NUMBER.findall(rewrite)):
        return "lost_number"
    if any(placeholder not in rewrite for placeholder in _PLACEHOLDER.findall(original)):
        return "lost_placeholder"
    folded = loose_key(rewrite)
    quoted = ("".join(groups) for groups in _QUOTED.findall(original))
    if any((loose_key(text).strip(_EDGES) or loose_key(text)) not in folded for text in quoted):
        return "lost_placeholder"
    if any(given.search(original) and not needed.search(rewrite) for given, needed in _FORMATS):
        return "lost_format"
    return None


def labels_in(instruction: str, labels: Iterable[str]) -> list[str]:
    """Return the labels that an instruction names, which its rewrites must keep.

    In a script that writes no spaces a label is named only where no longer one is: 不好 doesn't name 好.
    """
    labels = list(labels)
    text, named = plain_text(instruction), set()
    for label in sorted(labels, key=len, reverse=True):
        pattern = _label_pattern(label)
        if pattern and pattern.search(text):
            named.add(label)
            if _UNSPACED_EDGE.search(label) or _OPEN_END.search(label):
                text = pattern.sub(" ", text)
    return [label for label in labels if label in named]


@functools.lru_cache(maxsize=4096)
def _label_pattern(label: str) -> re.Pattern[str] | None:
    """Return what finds a label as whole words; case counts for a single letter ("A", not the article).

    Words end anywhere in a script without spaces, and Korean ones before a particle. Arabic ones may have an article, a
    particle and an ending.
    """
    words_of_label = plain_text(label).split()
    if not words_of_label:
        return None
    pattern = r"\s+".join(map(re.escape, words_of_label))
    inside = rf"[\w{combining_marks()}]"
    before = "" if _UNSPACED_EDGE.match(words_of_label[0]) else f"(?<!{inside})"
    after = "" if _OPEN_END.search(words_of_label[-1]) else f"(?!{inside})"
    if _ARABIC.match(pattern):
        before, after = f"{before}(?:[وفبكل]?(?:ال|ل)?)", f"[\u064b-\u0652]*[ةا]?[\u064b-\u0652]*{after}"
    return re.compile(f"{before}{pattern}{after}", 0 if len(label.strip()) == 1 else re.IGNORECASE)


def parse_paraphrase(text: str) -> str:
    """Return the first proper line of an answer to `paraphrase_prompt`, "" if there is none.

    Numbering, quotation marks around the whole and sentences such as "Sure, here is a rewrite:" are removed.
    """
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line.startswith("```") or _POLITE.match(line):
            continue
        parsed = _bare(line)
        if parsed:
            return parsed
    return ""


def _bare(line: str) -> str:
    """Strip numbering, openings, emphasis and quotation marks from a line until nothing changes."""
    while True:
        before = line
        line = _NUMBERING.sub("", line, count=1).strip()
        line = _OPENING_INLINE.sub("", line, count=1).strip()
        if emphasis := _EMPHASIS.match(line):
            line = emphasis["inner"].strip()
        # Only a pair that encloses the whole line: 'Say "yes" or "no"' keeps its quotation marks.
        if len(line) > 1 and _QUOTES.get(line[0]) == line[-1] and not {line[0], line[-1]} & set(line[1:-1]):
            line = line[1:-1].strip()
        if line == before:
            return line


def rewrite_requests(
    tasks: Iterable[Task], wanted: Mapping[str, int], table: ParaphraseTable, codec: PromptCodec, seed: int
) -> list[Row]:
    """Return requests {task, variant, prompt_ids, seeds}: one per way to ask, with its share of the attempts.

    A task gets paraphrase.max_attempts seeds per wanted rewrite.
    """
    requests: list[Row] = []
    for task in (task for task in tasks if wanted[task.id]):
        labels = labels_in(task.instruction, task.labels)
        attempts = table.max_attempts * wanted[task.id]
        for variant in range(min(NUM_VARIANTS, attempts)):
            numbers = range(len(range(variant, attempts, NUM_VARIANTS)))
            seeds = [derive_seed(seed, "paraphrase", task.id, str(variant), i) for i in numbers]
            prompt_ids = codec.encode_prompt(paraphrase_prompt(task.instruction, labels, variant))
            requests.append({"task": task.id, "variant": variant, "prompt_ids": prompt_ids, "seeds": seeds})
    return requests


def answers_in_turn(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return each task's answers in the order to try them: the first of every way to ask, then the second of each."""
    by_task: dict[str, list[list[Row]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row["answers"])
    return {
        task: [answer for turn in itertools.zip_longest(*lists) for answer in turn if answer is not None]
        for task, lists in by_task.items()
    }
