"""The turn of a chat template: where an answer begins and ends, and whether a thought precedes it.

The template writes marked conversations. What it makes of them decides how prompts are cut, and refuses a template that
loses, doubles or alters a message. Knows texts, no token ids.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from coalign.errors import UserError
from coalign.models.chat_template import MEND, ChatTemplate

Thinking = Literal["off", "keep", "strip"]
ANSWER = "text0sentinel"
USER = 'Text1 "Sentinel" & more,\n2nd  line: Äß'
SYSTEM = "Text2 System sentinel"
_LONG = "Text3 sentinel, " * 1000 + "end"
_NAME = r"(?:\w+:)?(?:think|thinking|thought|reason|reasoning)"
OPEN = re.compile(rf"[<\[◁]{_NAME}[>\]▷]", re.IGNORECASE)
CLOSE = re.compile(rf"[<\[◁]/{_NAME}[>\]▷]", re.IGNORECASE)
# What asks a template for no thought, in the order tried, and for one. Families name it differently.
_OPTIONS: dict[str, list[dict[str, bool]]] = {
    "off": [{"enable_thinking": False}, {"enable_thinking": False, "thinking": False}],
    "keep": [{"enable_thinking": True, "thinking": True}],
    "strip": [{"enable_thinking": True, "thinking": True}],
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """How a template writes an assistant's turn.

    `options` go into every rendering. `own_prompt` says that a prompt ends where the template puts an answer, and not
    with its generation prompt; `own_request` says so of what sampling continues. `opens` is True when a request ends
    within a thought. `marker` is what stands before an answer after a thought ("": a closing tag). `empty_thought`
    precedes an answer that has no thought of its own. `unwritten` is an empty thought that a prompt has and the
    template leaves out of a conversation. `after` follows an answer, `whole` is the conversation of USER
    and ANSWER, and `asked` that of USER alone. `has_system` is True when a system message is written as one.
    """

    thinking: Thinking
    options: dict[str, bool]
    own_prompt: bool
    own_request: bool
    opens: bool
    marker: str
    empty_thought: str
    unwritten: str
    after: str
    whole: str
    asked: str
    has_system: bool

    def describe(self) -> str:
        """Return a sentence or two on thoughts for the model's card, "" for a template without any."""
        prompt = self.whole.split(ANSWER)[0] if self.own_prompt else self.asked
        end = f"the prompt ends with `{prompt.rstrip()[-40:]!r}`"
        if self.thinking == "strip":
            return (
                "Answers were sampled with thoughts, which were taken off before anything was judged, compared or"
                f" counted. Training saw answers without a thought, as the chat template writes them: {end}."
            )
        if self.thinking == "keep":
            return "A thought that the model wrote is part of its answer, in training as in every comparison."
        if self.own_prompt or CLOSE.search(self.asked):
            return f"Training, sampling and evaluation were without thinking: {end}."
        return ""


@dataclasses.dataclass(frozen=True)
class _Shown:
    """What a template makes of the marked conversations, with and without its generation prompt."""

    asked: str
    bare: str
    whole: str
    thought: str
    has_system: bool


def find_turn(template: ChatTemplate, thinking: Thinking) -> Turn:
    """Return the template's turn. Raises UserError when it can't be trained, or not with this model.thinking."""
    for options in _OPTIONS[thinking]:
        shown = _show(template, options)
        opening = _open_at_end(shown.asked)
        if not opening:
            break
    if opening and thinking == "off":
        raise UserError(
            f"the chat template ({template.name}) always opens a thought ({opening!r} ends its prompt), so"
            ' model.thinking="off" can\'t be; set model.thinking="strip" to let the model think and take its thoughts'
            " off, or set model.chat_template to a template without"
        )
    head, after = shown.whole.split(ANSWER)
    asked, own = shown.asked.rstrip(), head.rstrip()
    between = own[len(asked) :].strip() if own.startswith(asked) else ""
    ignores = shown.asked == shown.bare  # the template has no generation prompt
    extra = asked[len(own) :].strip() if asked.startswith(own) else ""
    # Where a request opens a thought, the template's own turn has none there, or an empty one.
    begin = asked.removesuffix(opening).rstrip()
    silent = own == begin or (own.startswith(begin) and _is_empty_thought(own[len(begin) :].strip()))
    if not (own.startswith(asked) or (opening and silent) or _is_empty_thought(extra)):
        raise unlike(template, shown.whole, f"{asked}{ANSWER}")
    marker = between if between and not ignores and not CLOSE.search(between) else ""
    if thinking == "keep":
        _check_kept(template, shown, head if ignores else shown.asked, opening, marker)
    empty = _empty_thought(shown, head, opening) if thinking == "keep" and not ignores else ""
    differs = bool(between) or bool(opening and thinking == "strip")
    return Turn(
        thinking=thinking,
        options=options,
        own_prompt=differs and (thinking != "keep" or ignores),
        own_request=bool(between) and (thinking == "off" or ignores),
        opens=bool(opening),
        marker=marker if thinking == "strip" else "",
        empty_thought=empty,
        unwritten=extra + empty if extra and not differs else "",
        after=after,
        whole=shown.whole,
        asked=shown.asked,
        has_system=shown.has_system,
    )


def unlike(template: ChatTemplate, theirs: str, ours: str) -> UserError:
    """Return the error that shows the template's turn beside the one that would be trained."""
    same = 0
    while same < min(len(theirs), len(ours)) and theirs[same] == ours[same]:
        same += 1
    start = max(0, same - 40)
    return UserError(
        f"the chat template ({template.name}) writes an answer otherwise than it asks for one, so the turn can't be"
        f" trained: it writes {theirs[start : start + 160]!r} and asks for {ours[start : start + 160]!r}; {MEND}"
    )


def _show(template: ChatTemplate, options: dict[str, bool]) -> _Shown:
    user = {"role": "user", "content": USER}
    answer = {"role": "assistant", "content": ANSWER}
    system = {"role": "system", "content": SYSTEM}
    thought = {"role": "assistant", "content": f"<think>\n{SYSTEM}\n</think>\n\n{ANSWER}"}
    asks: dict[str, Any] = {**options, "add_generation_prompt": True}
    found = template.render_first(
        [
            ([user], asks),
            ([user], options),
            ([user, answer], options),
            ([user, thought], options),
            ([system, user], asks),
            ([system, user, answer], options),
            ([{"role": "user", "content": _LONG}], asks),
        ]
    )
    for text in (*found[:3], found[6]):
        if isinstance(text, UserError):
            raise text
    asked, bare, whole, kept, *with_system, long = (text if isinstance(text, str) else "" for text in found)
    _check_messages(template, asked, whole, long)
    has_system = all(
        text.count(SYSTEM) == text.count(USER) == 1 and text.rpartition(USER)[2] == plain.rpartition(USER)[2]
        for text, plain in zip(with_system, (asked, whole), strict=True)
    )
    return _Shown(asked, bare, whole, kept, has_system)


def _check_messages(template: ChatTemplate, asked: str, whole: str, long: str) -> None:
    """Raise UserError unless user and answer stand in the texts once, as they are."""
    if whole.count(ANSWER) != 1:
        does = "repeats" if ANSWER in whole else "alters" if ANSWER in whole.lower() else "drops"
        raise UserError(
            f"the chat template {does} the assistant's answer ({template.name}), so nothing could be trained: of the"
            f" answer {ANSWER!r} it makes {whole[-160:]!r}; set model.chat_template to a file with a template that"
            " renders it"
        )
    for text, user in ((asked, USER), (whole, USER), (long, _LONG)):
        if text.count(user) != 1:
            does = "repeats" if user in text else "alters" if "sentinel" in text.lower() else "drops"
            raise UserError(
                f"the chat template {does} the user's message ({template.name}): of {user[:80]!r} it makes"
                f" {text[:160]!r}; {MEND}"
            )
    if whole.index(ANSWER) < whole.index(USER):
        raise UserError(f"the chat template ({template.name}) writes the answer before the user's message; {MEND}")


def _check_kept(template: ChatTemplate, shown: _Shown, begin: str, opening: str, marker: str) -> None:
    """Raise UserError when the template does not write an answer with its thought as it was sampled."""
    kept = "<think>" + SYSTEM + "</think>" + ANSWER
    wanted = _squeezed(begin) + _squeezed(kept).removeprefix(opening)
    if opening not in ("", "<think>") or marker or not _squeezed(shown.thought).startswith(wanted):
        raise UserError(
            f"the chat template ({template.name}) does not keep the thought of an answer, so"
            f' model.thinking="keep" can\'t be: it writes {shown.thought[-160:]!r}; set model.thinking="strip"'
        )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _open_at_end(text: str) -> str:
    """Return the tag of the thought that the end of a text leaves open, else ""."""
    tags = [match for match in OPEN.finditer(text) if not CLOSE.search(text, match.end())]
    return tags[-1][0] if tags and not text[tags[-1].end() :].strip() else ""


def _is_empty_thought(text: str) -> bool:
    closing = CLOSE.search(text)
    return closing is not None and not OPEN.sub("", text[: closing.start()]).strip() and not text[closing.end() :]


def _empty_thought(shown: _Shown, head: str, opening: str) -> str:
    """Return what stands before an answer without a thought, after the generation prompt."""
    between = head[len(shown.asked) :] if head.startswith(shown.asked) else ""
    if CLOSE.search(between):
        return between
    return f"\n{opening[0]}/{opening[1:]}\n\n" if opening else ""
