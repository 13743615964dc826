"""What encloses a rewrite in a model's answer: special tokens written as text, tags, code fences, JSON objects.

Pure functions of texts. Knows no rewrites.
"""

from __future__ import annotations

import json
import re

_FENCE = re.compile(r"^\s*(?:```|~~~)")
_SPECIAL = re.compile(
    r"</?s>|<(?:eos|bos|pad|unk|end_of_turn|start_of_turn|end_of_utterance|turn\|)>|<[|｜][^<>\s]{1,40}[|｜]>"
    r"|\[/?INST\]|\[(?:EOS|BOS|PAD|SEP|CLS)\]|<</?SYS>>",
    re.IGNORECASE,
)
_ROLE = re.compile(r"^\s*(?:assistant|model|final)?\s*(?:\n+|(?=<[|｜]))", re.IGNORECASE)
# Tags that models put around a rewrite; others, such as <sep>, may be about the inputs.
_WRAPPER = (
    r"(?:new[_-]|rewritten[_-]|final[_-])?(?:instructions?|rewrite|rewritten|rephrased|rewording|paraphrased?|answer"
    r"|output|response|result|version|text|prompt)\d{0,2}"
)
_WRAPPED = re.compile(rf"<({_WRAPPER})>\s*(.*?)\s*</\1\s*>", re.DOTALL | re.IGNORECASE)
_LONE = re.compile(
    rf"</?(?P<name>{_WRAPPER})\s*>|^<(?P<first>[A-Za-z][\w-]*)>|</(?P<last>[A-Za-z][\w-]*)>$", re.IGNORECASE
)
_ENCLOSED = re.compile(r"^<(\w[\w-]*)>\s*(?P<inner>(?:(?!<\1>).)*?)\s*</\1\s*>$", re.DOTALL)


def without_special_tokens(text: str, original: str) -> str:
    """Return what stands before the first special token that is written as text; those at the beginning go."""
    text = text.strip()
    while match := _SPECIAL.search(text):
        if match[0] in original:
            return text
        if text[: match.start()].strip():
            return text[: match.start()].strip()
        text = _ROLE.sub("", text[match.end() :], count=1).strip()
    return text


def unwrapped(text: str, original: str) -> str:
    """Return what a tag or a code fence encloses, when the original has no such tag or fence."""
    for match in _WRAPPED.finditer(text):
        if f"<{match[1]}>".casefold() not in original.casefold():
            return match[2]
    enclosed = _ENCLOSED.match(text)
    if enclosed and f"<{enclosed[1]}>" not in original:
        text = enclosed["inner"]
    if text.startswith("{") and not original.lstrip().startswith("{"):
        text = _only_value(text)
    if any(_FENCE.match(line) for line in original.splitlines()):
        return text
    return "\n".join(line for line in text.splitlines() if not _FENCE.match(line))


def _only_value(text: str) -> str:
    """Return the text in a JSON object that holds one text, such as {"instruction": "..."}; else the text as it is."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text
    values = list(content.values()) if isinstance(content, dict) else []
    return values[0] if len(values) == 1 and isinstance(values[0], str) else text


def unclosed_tags(text: str) -> set[str]:
    """Return the tags around a rewrite, or a part of it, that only open or only close; and tokens of chat formats."""
    found = {token[0] for token in _SPECIAL.finditer(text)}
    for match in _LONE.finditer(text):
        name = str(match[match.lastgroup or 0]).casefold()
        folded = text.casefold()
        if folded.count(f"<{name}>") != folded.count(f"</{name}"):
            found.add(name)
    return found
