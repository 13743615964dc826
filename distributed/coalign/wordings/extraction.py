"""The rewrite within a model's answer: what models write around it is taken off.

That is thoughts, special tokens written as text, tags, code fences, openings, numbering, quotation marks and closing
remarks. Pure functions of texts. Knows no checks: `rewrites` says which rewrites are usable.
"""

from __future__ import annotations

import re

from coalign.prompts import strip_thought
from coalign.wordings.wrappings import unwrapped, without_special_tokens

# Words about a rewrite itself, as opposed to words of an instruction.
ABOUT_REWRITES = (
    r"\b(?:rewrit|rephras|paraphras|reword|reformul|restat)\w*|\b(?:new|another|alternative|different|revised|clearer"
    r"|possible|same) (?:version|wording|way|instruction|phrasing|formulation|meaning|variant|text)s?\b"
    r"|\b(?:version|wording|phrasing)s?\b|\boriginal (?:instruction|meaning|text|wording)\b"
    r"|umformul|umschreib|neuformul|neu formul|formulierung|riformul|parafras|перефраз|переформул|改写|改寫|重写|重寫"
    r"|\bmeaning (?:is|stays|remains)\b|\b(?:keep|preserv|retain|maintain|convey)\w* (?:the|its)(?: \w+)? meaning\b"
    r"|换一种|換一種|換句話|换句话|言い換え|書き換え|바꿔 ?쓴|다시 쓴"
)
_ABOUT = re.compile(ABOUT_REWRITES, re.IGNORECASE)
_POLITENESS = (
    r"(?:(?:sure|certainly|of course|absolutely|okay|ok|great|no problem|gern|gerne|natürlich|claro|bien sûr)\b"
    r"\s*[,.!:]*\s*)"
)
_HERE_WORDS = (
    r"(?:here(?:['’]s|\s+(?:is|are))|hier (?:ist|sind)|voici|voilà|aquí (?:está|tienes?)|ecco|aqui (?:está|vai)|вот"
    r"|以下|这是|這是)"
)
_HERE = (
    rf"{_HERE_WORDS}[^\n:：]{{0,60}}?(?:{ABOUT_REWRITES})[^\n:：]{{0,60}}|here (?:it is|is it|you go)"
    rf"|{_HERE_WORDS}"
    r"|(?:you|one|we) (?:could|can|might|may)(?: also)? (?:say|ask|write|put it|phrase it)[^\n:：]{0,30}"
    r"|(?:how about|try|try this|try this one|one way to (?:say|put|ask|phrase)[^\n:：]{0,20})"
    r"|another way to (?:say|put|ask|phrase)[^\n:：]{0,20}"
)
_CAPTION = (
    r"(?:the |my |a |one |possible )?(?:rewritten|paraphrased|reworded|rephrased|new|alternative)"
    r" (?:instruction|version|text|wording)[^\n:：]{0,30}"
    r"|(?:instruction|paraphrase|rewrite|rewritten|rephrased)\s*(?:\d{1,2})?|(?:version|option|alternative)\s*\d{1,2}"
    r"|(?:umformulierung|reformulation|neue anweisung|改写(?:后)?|改寫|重写|言い換え)"
)
OPENING = re.compile(rf"^{_POLITENESS}?(?:{_HERE}|{_CAPTION})\s*[:：]\s*", re.IGNORECASE)
_INTRODUCTION = re.compile(
    rf"^{_POLITENESS}?{_HERE_WORDS}[^\n]{{0,60}}?(?:{ABOUT_REWRITES})[^\n]{{0,60}}[.!]$", re.IGNORECASE
)
_POLITE = re.compile(rf"^{_POLITENESS}$", re.IGNORECASE)
_EXCLAIMED = re.compile(
    r"^(?:sure|certainly|of course|absolutely|okay|no problem|great|gladly|got it)\b[^.:?!\n]{0,40}!\s+(?=\S)",
    re.IGNORECASE,
)
_ANY_FORM = re.compile(r"\b(?:its|the|in|by|which\w*) (?:version|wording|phrasing)s?\b", re.IGNORECASE)  # of an input
_BEFORE_COLON = re.compile(r"^([^\n:：.,;!?]{1,80})[:：]\s*(?=\S)")
_LABEL = re.compile(r"^(\*\*|__)(?:final )?(?:answer|response|output|result)[:：]?\1\s*[:：]?\s*(?=\S)", re.IGNORECASE)
_HOPES = re.compile(
    r"(?<=[.!?。！？])\s*(?:(?:i )?hope (?:this|that|it)|let me know|feel free|ich hoffe|j['’]espère|espero que"
    r"|spero che|希望)[^.!?。！？\n]*[.!?。！？]?$",
    re.IGNORECASE,
)
_EMPHASISED = re.compile(r"^\*\*([^*\n]{1,60})\*\*\s*[:：]?\s+(?=\S)")
_IN_BRACKETS = re.compile(r"\s*(\([^()\n]*\))$")
_HEADING = re.compile(rf"^(?:#{{1,6}}\s+[^\n]*|(\*\*|__)(?:{_CAPTION})[:：]?\1[:：]?)$", re.IGNORECASE)
_ORIGINAL = re.compile(
    r"^\W{0,3}(?:original\b[^\n:：]{0,30}|(?:my )?(?:thinking|thoughts?|reasoning|analysis))\W{0,3}[:：]", re.IGNORECASE
)
_LISTED = re.compile(r"^\s{0,3}(?:\(?\d{1,2}[.):]\s|\(?[a-h]\)\s|[-*•]\s|\d\ufe0f?\u20e3)\s*")
_SECOND = re.compile(r"\s+\(?2[.):]\s")
_EMPHASIS = re.compile(r"^(\*\*|__)(?P<inner>(?:(?!\1).)+)\1$", re.DOTALL)
_QUOTES = {'"': '"', "'": "'", "“": "”", "„": "“", "‘": "’", "«": "»", "「": "」", "『": "』", "`": "`"}

# What follows a rewrite: another one, a remark about it, or a friendly end.
_NEXT = re.compile(
    r"^\W{0,4}(?:option|version|rewrite|alternative|variant|variante|paraphrase)\s*\d{1,2}\W*(?:[:：.)]|$)"
    r"|^\W{0,4}(?:or|oder|ou|o|alternatively)\W{0,3}$|^\s*[-*_=]{3,}\s*$",
    re.IGNORECASE,
)
_PART = re.compile(
    r"^\W{0,4}(?:explanation|input|output|example|examples|answer|response|question|user|assistant|instruction"
    r"|erklärung|explication|explicación|解释|说明)\s*\d{0,2}\W{0,4}[:：]",
    re.IGNORECASE,
)
_FAREWELL = re.compile(
    r"^\W{0,3}(?:i hope|hope (?:this|that|it)|let me know|please let me know|feel free|is there anything|would you like"
    r"|do you want me|if you (?:need|want|have|would like|['’]d like) (?:any|me|more|another|further|other|help|a )"
    r"|ich hoffe|lass(?:en sie)? mich wissen|sag(?:en sie)? (?:mir )?bescheid|j['’]espère|n['’]hésite|faites-moi savoir"
    r"|espero que|avísame|déjame saber|si necesitas|spero che|fammi sapere|me avise|надеюсь|дайте знать"
    r"|希望(?:这|這|对|能|以上)|如果(?:您|你)(?:还|還|需要|有)|请告诉我|請告訴我|お役に立て|ご不明)",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"^\W{0,3}(?:this|these|both|i|i['’](?:ve|m|d)|note|in this|my|the (?:new|above|rewritten|revised|meaning)"
    r"|dies\w*|ich|hinweis|cette|j['’]ai|note|esta|este|he|nota|questa|essa)\b|^\W{0,3}(?:这|這|此|注|この)",
    re.IGNORECASE,
)


def parse_paraphrase(text: str, original: str = "") -> str:
    """Return the rewrite in a model's answer to `paraphrase_prompt`, with all its lines; "" if there is none.

    Of several rewrites it is the first. `original` is the instruction that was to be rewritten: what belongs to it
    (a list, a line that ends in a colon, a tag, a special token) is not taken off.
    """
    text = without_special_tokens(strip_thought(text), original)
    while True:
        before = text
        text = _bare(_without_surroundings(unwrapped(text, original), original), original)
        if text == before:
            return text


def parse_cut_off(text: str, original: str = "") -> str:
    """Return the first line of a rewrite in an answer that reached its limit of tokens, "" if that line is not whole.

    Of an original of several lines nothing is usable: what is missing cannot be known.
    """
    if len(original.strip().splitlines()) > 1:
        return ""
    return parse_paraphrase(strip_thought(text).rpartition("\n")[0], original).partition("\n")[0].strip()


def _without_surroundings(text: str, original: str) -> str:
    """Return the lines of the rewrite: without openings before it, and without what follows it."""
    lines = [line.rstrip() for line in text.splitlines()]
    while lines and (not lines[0].strip() or _opens(lines, original)):
        del lines[0]
    if not original.strip() or len(original.strip().splitlines()) == 1:
        lines = lines[:1] + _until(lines[1:], (_NEXT, _PART, _FAREWELL), original)
    else:
        lines = lines[:1] + _until(lines[1:], (_NEXT, _FAREWELL), original)
    lines = _first_item(lines, original)
    while len(lines) > 1 and (not lines[-1].strip() or _remarks(lines[-1], original)):
        del lines[-1]
    return "\n".join(lines).strip()


def _opens(lines: list[str], original: str) -> bool:
    """Return whether the first line stands before the rewrite: it is polite, a heading, or ends in a colon."""
    line, rest = lines[0].strip(), [other for other in lines[1:] if other.strip()]
    if _POLITE.match(line) or (_ORIGINAL.match(line) and rest and not _ORIGINAL.match(original)):
        return True
    if not rest:
        return False
    if (_HEADING.match(line) and line not in original) or _INTRODUCTION.match(line):
        return True
    if not line.rstrip("*_ ").endswith((":", "：")):
        return False
    if OPENING.match(line.strip("*_# ")) or (_ABOUT.search(line) and not _ABOUT.search(original)):
        return True
    # A rewrite may introduce a list of its own, of labels or rules: as the original does, or of short items.
    own = [other for other in original.splitlines() if other.strip()]
    introduces = any(other.rstrip().endswith((":", "：")) for other in own[:-1])
    short = all(_LISTED.match(other) and len(other.split()) < len(original.split()) / 2 for other in rest)
    return not short and (not introduces or len(rest) >= len(own))


def _until(lines: list[str], ends: tuple[re.Pattern[str], ...], original: str) -> list[str]:
    """Return the lines before the first that matches one of `ends` and does not begin as a line of the original."""
    own = [line.strip().casefold() for line in original.splitlines()]
    for place, line in enumerate(lines):
        for pattern in ends:
            match = pattern.match(line.strip())
            if match and not any(other.startswith(match[0].casefold()) for other in own):
                return lines[:place]
    return lines


def _has_list(original: str) -> bool:
    """Return whether an instruction is a list from its first line on."""
    lines = [line for line in original.splitlines() if line.strip()]
    return len(lines) > 1 and all(_LISTED.match(line) for line in lines[:2])


def _first_item(lines: list[str], original: str) -> list[str]:
    """Return the first of several listed rewrites, with its lines; where the original is a list, the list stays."""
    if _has_list(original) or not lines:
        return lines
    if all(line.strip()[0] in _QUOTES and line.strip()[-1] in _QUOTES.values() for line in lines if line.strip()):
        return lines[:1]
    if not _LISTED.match(lines[0]):
        return lines
    kind = _kind_of_item(lines[0])
    if kind == "1" and (second_inside := _SECOND.search(lines[0])):
        return [lines[0][: second_inside.start()]]
    later = (place for place, line in enumerate(lines) if place and _LISTED.match(line) and _kind_of_item(line) == kind)
    return lines[: next(later, len(lines))]


def _kind_of_item(line: str) -> str:
    """Return the mark of a list item, 1 for any number and a for any letter."""
    mark = line.strip(" (")[0]
    return "1" if mark.isdigit() else "a" if mark.isalpha() else mark


def _remarks(line: str, original: str) -> bool:
    """Return whether a last line is a remark about the rewrite, which the original says nothing of."""
    return bool(_REMARK.match(line)) and _about_rewrites(line, original)


def _about_rewrites(text: str, original: str) -> bool:
    """Return whether a text speaks of rewriting or of a meaning kept, and the original does not."""
    if _ABOUT.search(original) or ("meaning" in text and "meaning" in original):
        return False
    return _ABOUT.search(text) is not None


def _bare(text: str, original: str) -> str:
    """Strip numbering, openings, emphasis and quotation marks around a rewrite until nothing changes."""
    has_list = _has_list(original)
    while True:
        before = text
        if not has_list:
            text = _LISTED.sub("", text, count=1).strip()
        text = _LABEL.sub("", OPENING.sub("", text, count=1).strip(), count=1)
        text = _EXCLAIMED.sub("", text, count=1)
        text = _without_remarks_inside(text, original)
        if emphasis := _EMPHASIS.match(text):
            text = emphasis["inner"].strip()
        if text.startswith(">") and all(line.startswith(">") for line in text.splitlines()):
            text = "\n".join(line[1:].strip() for line in text.splitlines())
        # Only a pair that encloses the whole: 'Say "yes" or "no"' keeps its quotation marks.
        if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and not {text[0], text[-1]} & set(text[1:-1]):
            text = text[1:-1].strip()
        if len(text) > 6 and text[:3] == text[-3:] and text[:3] in ('"""', "'''"):
            text = text[3:-3].strip()
        if text == before:
            return text


def _without_remarks_inside(text: str, original: str) -> str:
    """Strip from a line what is said of the rewrite itself: before a colon, or in brackets at the end."""
    if (hope := _HOPES.search(text)) and not _HOPES.search(original):
        text = text[: hope.start()]
    if not original:
        return text.strip()
    if (caption := _EMPHASISED.match(text)) and _about_rewrites(caption[1], original):
        text = text[caption.end() :].lstrip()
    opening = _BEFORE_COLON.match(text)
    if opening and _about_rewrites(_ANY_FORM.sub("", opening[1]), original):
        text = text[opening.end() :]
    if (remark := _IN_BRACKETS.search(text)) and _about_rewrites(remark[1], original):
        text = text[: remark.start()]
    return text.strip()
