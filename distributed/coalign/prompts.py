"""Every text shown to a model besides the data: chat templates of our own, requests for paraphrases, questions.

Pure strings. Knows no tokenizer: the caller encodes a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

YES = "Yes"
NO = "No"


class SystemPrompt(str):
    """A request whose instruction becomes a system message where the chat template has one.

    As a string it is the user's message elsewhere: instruction, an empty line, input.
    """

    def __new__(cls, system: str, user: str) -> SystemPrompt:
        """Join the two."""
        return super().__new__(cls, f"{system}\n\n{user}")

    def __init__(self, system: str, user: str) -> None:
        self.system, self.user = system, user

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]  # of two strings it is made again
        """Return what a copy in another process is made from."""
        return self.system, self.user


# For a tokenizer without a chat template (a base model). Every model that we export contains it.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ '### Instruction:\n' + m['content'] + '\n\n### Response:\n' }}{% endif %}{% endfor %}"
)

# The chat template of the random model that prepare makes.
TINY_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|assistant|>{{ m['content'] }}<|end|>{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Short, because small models follow short requests. Several openings give more varied rewrites than one.
REQUESTS = (
    "Rewrite this instruction in other words. Keep its meaning.",
    "Say this instruction in a different way. It must ask for exactly the same.",
    "Paraphrase the instruction below. Somebody who follows it must give the same answers as before.",
    "How else could one ask for this? Write one new instruction with the same meaning.",
)
NUM_VARIANTS = len(REQUESTS)


def paraphrase_prompt(instruction: str, labels: Sequence[str], variant: int) -> str:
    """Return the request for one rewrite of an instruction; `variant` selects the way to ask, modulo their number.

    `labels` are words of the instruction that the rewrite must keep unchanged.
    """
    lines = [REQUESTS[variant % NUM_VARIANTS]]
    if labels:
        lines.append(f"Keep these words: {', '.join(labels)}.")
    return "\n".join(lines) + f"\n\nInstruction: {instruction}"


# The response comes last: all questions about one input then share a prefix, which is computed once.


def type_question(instruction: str, input_text: str, response: str) -> str:
    """Return the judge's first question: is the response of the type that the instruction asks for?"""
    return (
        "Is the response the kind of answer that the instruction asks for, right or wrong?"
        f" Answer {YES} or {NO}.\n\n{_asked(instruction, input_text)}\nResponse: {response}"
    )


def correct_question(instruction: str, input_text: str, response: str, gold: str | None) -> str:
    """Return the judge's second question: is the response correct?

    With `gold` it shows only the expected answer and the response: small models compare them better without the
    instruction and the input between them.
    """
    known = _asked(instruction, input_text) if gold is None else f"Expected: {gold}"
    return f"Is the response correct? Answer {YES} or {NO}.\n\n{known}\nResponse: {response}"


def _asked(instruction: str, input_text: str) -> str:
    return f"Instruction: {instruction}\nInput: {input_text}" if input_text else f"Instruction: {instruction}"


def same_answer_question(first: str, second: str) -> str:
    """Return the question whether two answers to one request mean the same (eval.agreement = a judge's folder)."""
    return f"Answer A: {first}\nAnswer B: {second}\n\nDo both answers mean the same? Answer {YES} or {NO}."


# What a reasoning model writes before its answer, in the marks of the known families: (opening, closing).
_THINK = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reason|reasoning|reflection|analysis|scratchpad|cot)"
_THOUGHT = (
    (rf"<{_THINK}(?:\s[^<>]*)?>", rf"</{_THINK}\s*>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"<\|(?:think|thinking|thought|reasoning)\|>", r"<\|/(?:think|thinking|thought|reasoning)\|>"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|(?:begin|start)_of_(?:thought|thinking)\|>", r"<\|end_of_(?:thought|thinking)\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<\|channel\|>\s*(?:analysis|commentary)", r"<\|channel\|>\s*final\s*(?:<\|constrain\|>[^<]*)?<\|message\|>"),
)
_THOUGHT_MARK = re.compile(
    "|".join(f"(?P<opening{number}>{opening})|{closing}" for number, (opening, closing) in enumerate(_THOUGHT)),
    re.IGNORECASE,
)


def strip_thought(text: str) -> str:
    """Return a model's answer without its thoughts, "" when a thought has no end.

    A closing mark alone ends a thought that the generation prompt began: what stands before it is no answer.
    """
    kept: list[str] = []
    start, within = 0, False
    for mark in _THOUGHT_MARK.finditer(text):
        if mark.lastgroup:
            if not within:
                kept.append(text[start : mark.start()])
            within = True
        else:
            if not within:
                kept.clear()
            start, within = mark.end(), False
    return "" if within else "".join([*kept, text[start:]]).strip()
