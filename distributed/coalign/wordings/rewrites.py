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
from coalign.prompts import NUM_VARIANTS, REQUESTS, paraphrase_prompt
from coalign.records import Row, Task
from coalign.text import UNSPACED, combining_marks, loose_key, words
from coalign.wordings.asking import PromptCodec
from coalign.wordings.extraction import OPENING
from coalign.wordings.extraction import parse_paraphrase as parse_paraphrase
from coalign.wordings.languages import in_other_language, in_other_script
from coalign.wordings.near_repeats import NearRepeats, repeats
from coalign.wordings.wrappings import unclosed_tags

# Why a rewrite is dropped. filtering.py adds "longer_than_context", and files of wordings "unknown_task".
Reason = Literal[
    "empty",
    "cut_off",
    "malformed",
    "repeats_request",
    "refusal",
    "unclosed_tag",
    "only_opening",
    "several_texts",
    "other_language",
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
_UNSPACED = re.compile(f"[{UNSPACED}]")
_ARABIC = re.compile("[\u0620-\u064a]")
_HANGUL = re.compile("[\uac00-\ud7a3]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_PLACEHOLDER = re.compile(r"\{[^{}\n]{1,40}\}|<[^<>\s]{1,40}>|\[[A-Z][^\[\]\n]{0,40}\]")
_QUOTED = re.compile(r"\"([^\"\n]{1,60})\"|“([^”\n]{1,60})”|`([^`\n]{1,60})`|(?<!\w)['‘]([^'’\n]{1,60})['’](?!\w)")
# Bytes that no instruction has: control characters, and what a broken UTF-8 sequence decodes to.
_BROKEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")

_SENTENCE = re.compile(r"[^.!?。！？\n:]+")
_REQUEST_SENTENCES = [
    frozenset(found) for text in REQUESTS for s in _SENTENCE.findall(text) if len(found := words(s)) > 3
]
_ASKS_TO_REWRITE = re.compile(
    r"\b(?:rewrit|rephras|paraphras|reword|restat|reformul|réécri|parafras|reescrib|umformul|umschreib|formulier)\w*\b"
    r"[^.!?\n]{0,40}\b(?:instructions?|instrucci\w+|instru[çc]\w+|istruzion\w+|anweisung\w*|instruktion\w*|consignes?)\b"
    r"|(?:改写|改寫|重写|重寫|言い換え)[^。！？\n]{0,8}(?:指令|指示|说明|說明)|^keep these words:",
    re.IGNORECASE | re.MULTILINE,
)
# How a model begins that declines, asks back or thinks aloud instead of rewriting.
_NO_REWRITE = (
    r"(?:i['’]?m|i am|we['’]?re|we are)(?: really| very| so)? sorry|sorry\b|apologies|(?:my|i) apolog\w+",
    r"(?:i|we) (?:can(?:not|['’]?t)|could(?: not|n['’]?t)|won['’]?t|will not|do(?: not|n['’]?t)) (?:help|assist|rewrite"
    r"|rephrase|paraphrase|do (?:that|this)|fulfil\w*|comply|provide|answer|create|generate|determine"
    r"|understand|process|access|complete|engage|discuss|have|see)",
    r"(?:i['’]?m|i am) (?:not able to|unable to|(?:just |only )?an? (?:ai|artificial|(?:large )?language model))",
    r"unfortunately|it (?:seems|looks|appears)(?: like| that)? you",
    r"as an? (?:ai|artificial intelligence|(?:large )?language model)(?: \w+){0,3},? (?:i|my|we)",
    r"(?:please|could you|can you) (?:provide|share|give me|send)(?: me)?(?: with)? (?:the|your) (?:\w+ )?instruction",
    r"(?:what|which) instruction (?:would|do|should)|the user (?:wants|is asking|asked|has|asks)|let me think",
    r"(?:okay|ok|alright|hmm|so|first|well)\W{1,3}(?:so )?(?:the user|i need to|let me|i should|let['’]s)",
    r"(?:es )?tut mir (?:sehr )?leid|entschuldig\w+|leider kann ich|das kann ich (?:leider )?nicht",
    r"als (?:eine? )?(?:ki|künstliche|sprachmodell)|ich kann (?:\w+ ){0,3}nicht",
    r"(?:je suis )?(?:vraiment )?désolée?|je ne (?:peux|suis)|en tant qu(?:e |['’])(?:ia|intell|mod)\w*",
    r"lo (?:siento|lamento)|disculpa\w*|no puedo|lamentablemente|como (?:una? )?(?:ia|modelo|inteligencia)",
    r"mi dispiace|non posso|purtroppo|come (?:un['’a]? ?)?(?:ia|modello|intelligenza)",
    r"desculp\w+|sinto muito|lamento|não posso|infelizmente|het spijt me|helaas|als (?:een )?(?:ai|taalmodel)",
    r"przykro mi|przepraszam|niestety|jag är ledsen|tyvärr|üzgünüm|maaf|xin lỗi",
    r"извините|простите|к сожалению|я не могу|как (?:ии|искусственн\w+|языковая модель)",
)
_NO_REWRITE_UNSPACED = (
    r"(?:非常|很|真的)?(?:抱歉|对不起|對不起|不好意思)|(?:作为|作為)(?:一[个個名])?(?:AI|人工|语言|語言|大型)",
    r"我(?:无法|無法|不能|没有办法)",
    r"(?:大変)?申し訳|すみません|ごめんなさい|残念ながら|AIとして|죄송|미안|عذر|آسف|أعتذر|क्षमा|माफ",
)
_REFUSAL = re.compile(
    rf"^\W{{0,3}}(?:(?:{'|'.join(_NO_REWRITE)})(?!\w)|{'|'.join(_NO_REWRITE_UNSPACED)})", re.IGNORECASE
)

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
    if foreign := _foreign(original, rewrite, asked):
        return foreign
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


def _foreign(original: str, rewrite: str, asked: int) -> Reason | None:
    """Return the reason if a rewrite is something else than one instruction; `asked` are the original's words."""
    if _REFUSAL.search(rewrite) and not _REFUSAL.search(original):
        return "refusal"
    if unclosed_tags(rewrite) - unclosed_tags(original):
        return "unclosed_tag"
    if rewrite.rstrip("*_ ").endswith((":", "：")) and OPENING.fullmatch(rewrite) and not OPENING.fullmatch(original):
        return "only_opening"
    if _repeats_request(rewrite) and not _repeats_request(original):
        return "repeats_request"
    lines = [len(words(line)) for line in rewrite.splitlines()]
    if "\n" not in original.strip() and sum(number >= 0.7 * asked for number in lines) > 1:
        return "several_texts"
    return "other_language" if in_other_script(rewrite, original) or in_other_language(rewrite, original) else None


def _repeats_request(text: str) -> bool:
    """Return whether a text has a sentence much like one of our own requests for a rewrite."""
    sentences = [frozenset(words(sentence)) for sentence in _SENTENCE.findall(text)]
    alike = any(
        len(sentence & asked) >= 0.6 * len(sentence | asked) for sentence in sentences for asked in _REQUEST_SENTENCES
    )
    return alike or _ASKS_TO_REWRITE.search(text) is not None


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
            if _UNSPACED.search(label) or _HANGUL.search(label):
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
    marks = combining_marks()
    first, last = pattern[0], re.sub(f"[{marks}]+$", "", words_of_label[-1])[-1:]
    before = "" if _UNSPACED.match(first) else rf"(?<![\w{marks}])"
    after = f"(?![{marks}])" if _UNSPACED.match(last) or _HANGUL.match(last) else rf"(?![\w{marks}])"
    if _ARABIC.match(pattern):
        before, after = f"{before}(?:[وفبكل]?(?:ال|ل)?)", f"[\u064b-\u0652]*[ةا]?[\u064b-\u0652]*{after}"
    return re.compile(f"{before}{pattern}{after}", 0 if len(label.strip()) == 1 else re.IGNORECASE)


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
            prompt_ids = codec.encode_request(paraphrase_prompt(task.instruction, labels, variant))
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
