"""Text to token ids and back: chat template, exactly one BOS, a trained end-of-turn, the length of the context.

Everything behind it carries token ids. Knows a tokenizer, no model weights.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from coalign.config import ModelTable
from coalign.errors import UserError
from coalign.models.chat_template import ChatTemplate, today
from coalign.models.turn import ANSWER, CLOSE, OPEN, USER, find_turn, unlike
from coalign.prompts import PLAIN_TEMPLATE, SystemPrompt
from coalign.runs.digests import digest_value

logger = logging.getLogger("coalign")

_APART = {"user": "text4sentinel", "system": "text5sentinel"}  # stand for messages encoded apart from the template
_SPLIT = re.compile("|".join(_APART.values()))


class Codec:
    """Turns prompts and answers into token ids, the same way for training, sampling and scoring.

    Prompt and answer are encoded apart and joined as ids, so that training sees the ids that generation produces. They
    join to the chat template's own turn, which is checked here, token by token but for white space around an answer.
    `stop_ids` end an answer: the end of turn, EOS and `source_stops`, those of the model's generation config.
    `max_tokens` is the context in tokens, `date` (YYYY-MM-DD) what a template that writes today's date sees.

    Raises UserError for a chat template that can't be used, also with this model.thinking, a special token that the
    tokenizer lacks, a tokenizer that makes no tokens, or `model.max_tokens` beyond the model's context.
    """

    def __init__(self, tokenizer: Any, table: ModelTable, source_stops: Iterable[int] = (), date: str = "") -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            logger.info("the tokenizer has no chat template; using a plain instruction / response form")
            tokenizer.chat_template = PLAIN_TEMPLATE
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        if not self.encode_plain(ANSWER):
            raise UserError("the tokenizer makes no tokens of a text (its vocabulary is empty); use another model")
        self._template = ChatTemplate(tokenizer, table.chat_template or "the tokenizer's own", date or today())
        self.turn = find_turn(self._template, table.thinking)
        self.bos_id: int | None = self._default_bos()
        self.end_of_turn_id, self._ends = self._find_end_of_turn(table)
        self.pad_id = self._find_pad(table)
        if table.max_tokens > tokenizer.model_max_length:
            raise UserError(
                f"model.max_tokens={table.max_tokens} is more than the model's context of {tokenizer.model_max_length}"
                f" tokens; use {tokenizer.model_max_length} or less (0: all of it)"
            )
        self.max_tokens = int(table.max_tokens or tokenizer.model_max_length)
        stops = {index for index in source_stops if 0 <= index < len(tokenizer)}
        self.stop_ids = sorted({self.end_of_turn_id, tokenizer.eos_token_id, *stops} - {None})
        self._check_turn()

    def digest(self) -> str:
        """Return a digest of everything that decides which ids a text becomes."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = fast.to_str() if fast is not None else sorted(self.tokenizer.get_vocab().items())
        own: list[Any] = [self.tokenizer.chat_template, self.bos_id, self.end_of_turn_id, self.max_tokens]
        if self._template.has_date:
            own.append(self._template.date)
        if self.turn.thinking != "off" or self.turn.own_prompt:
            own.append([self.turn.thinking, self.turn.own_prompt])
        return digest_value([type(self.tokenizer).__name__, rules, *own])

    @property
    def end_of_turn(self) -> str:
        """Return the token that ends an answer."""
        token: str = self.tokenizer.convert_ids_to_tokens(self.end_of_turn_id)
        return token

    @property
    def ends(self) -> list[int]:
        """Return the stop ids, the trained end of turn first."""
        return sorted(self.stop_ids, key=lambda index: index != self.end_of_turn_id)

    def encode_prompt(self, user_text: str) -> list[int]:
        """Return the ids of a user's message up to where the answer begins, with one BOS where the model has one.

        Training and scoring put an answer here. Raises UserError when the template alters the message.
        """
        return self._encode_message(user_text, self.turn.own_prompt)

    def encode_request(self, user_text: str) -> list[int]:
        """Return the ids of a user's message that sampling continues, with a thought first where the model has one.

        They are those of `encode_prompt` unless model.thinking is "strip".
        """
        return self._encode_message(user_text, self.turn.own_request)

    def _encode_message(self, prompt: str, own: bool) -> list[int]:
        if isinstance(prompt, SystemPrompt) and self.turn.has_system:
            texts = {"system": prompt.system, "user": prompt.user}
        else:
            texts = {"user": str(prompt)}
        if not self._special.search(prompt):
            return self._with_bos(self._encode_template(self._render_prompt(texts, own)))
        # "</s>" in the data is text and must not end a turn, so it is encoded apart from the template's own tokens.
        rendered = self._render_prompt({role: _APART[role] for role in texts}, own)
        first, *pieces = _SPLIT.split(rendered)
        ids = self._encode_template(first)
        for text, piece in zip(texts.values(), pieces, strict=True):
            ids += self.encode_plain(text) + self._encode_template(piece)
        return self._with_bos(ids)

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos_id is not None:
            while len(ids) > 1 and ids[0] == ids[1] == self.bos_id:
                ids = ids[1:]
            if not ids or ids[0] != self.bos_id:
                ids = [self.bos_id, *ids]
        return ids

    def _render_prompt(self, texts: Mapping[str, str], own: bool) -> str:
        """Return {role: message} in the template up to the answer: its generation prompt, or its `own` turn's."""
        messages = [{"role": role, "content": text} for role, text in texts.items()]
        if own:
            messages.append({"role": "assistant", "content": ANSWER})
        rendered = self._template.render(messages, add_generation_prompt=not own, **self.turn.options)
        for text in (*texts.values(), *([ANSWER] if own else [])):
            if text.strip() not in rendered:
                raise UserError(
                    f"the chat template ({self._template.name}) alters the message {text[:80]!r}; set"
                    " model.chat_template to a file with a template that renders it as it is"
                )
        return rendered[: rendered.rindex(ANSWER)] if own else rendered

    def encode_answer(self, text: str, finished: bool = True) -> list[int]:
        """Return the ids of an answer, followed by the end-of-turn when `finished`."""
        ids = [*self.encode_plain(text), *([self.end_of_turn_id] if finished else [])]
        empty = self.turn.empty_thought
        return [*self._encode_template(empty), *ids] if empty and not CLOSE.search(text) else ids

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text without a template; what looks like a special token stays text."""
        options = {"split_special_tokens": True} if self._special.search(text) else {}
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False, **options).input_ids
        return ids

    def _encode_template(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of answer ids, without special tokens and surrounding white space."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def describe_answer(self, ids: list[int], finished: bool) -> dict[str, Any]:
        """Return an answer as workers report it: {"text", "finish", "num_tokens"}.

        `ids` come without the stop token; `num_tokens` counts it. `finish` is "stop", or "length" for a cut answer.
        With model.thinking "strip" the text and its tokens are those after the thought; within a thought that did not
        end they are none.
        """
        if self.turn.thinking == "strip":
            ids = self._without_thought(ids)
        finish = "stop" if finished else "length"
        return {"text": self.decode(ids), "finish": finish, "num_tokens": len(ids) + finished}

    def _without_thought(self, ids: list[int]) -> list[int]:
        """Return the ids after the last thought, [] while one is open."""
        if self.turn.marker:
            marker = self._encode_template(self.turn.marker)
            starts = [i for i in range(len(ids) - len(marker) + 1) if ids[i : i + len(marker)] == marker]
            return ids[starts[-1] + len(marker) :] if starts else []
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        closed = [match.end() for match in CLOSE.finditer(text)]
        rest = text[closed[-1] :] if closed else text
        if OPEN.search(rest) or (self.turn.opens and not closed):
            return []
        return self._encode_template(rest.lstrip()) if closed else ids

    def _default_bos(self) -> int | None:
        """Return the BOS id when the tokenizer or the template puts one before a text, else None."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return None
        ids = self.tokenizer("x").input_ids
        template_has_it = self.turn.whole.startswith(self.tokenizer.bos_token)
        return int(bos) if template_has_it or (ids and ids[0] == bos) else None

    def _find_end_of_turn(self, table: ModelTable) -> tuple[int, bool]:
        """Return the id of the token that ends an answer, and whether the template itself writes it there."""
        tokenizer = self.tokenizer
        tail = self._encode_template(self.turn.after.strip())
        if table.end_of_turn:
            chosen = _token_id(tokenizer, table.end_of_turn, "model.end_of_turn")
            return chosen, tail[:1] == [chosen]
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if tail and tail[0] in special:
            return tail[0], True
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has neither an end-of-turn in its chat template nor an EOS token; name one with"
                " model.end_of_turn"
            )
        logger.info(
            "end of turn: the tokenizer's EOS %r (the chat template ends an answer without one)", tokenizer.eos_token
        )
        return int(tokenizer.eos_token_id), False

    def _check_turn(self) -> None:
        """Raise UserError unless a prompt and its answer join to the turn that the template writes."""
        ours = self.encode_prompt(USER) + self.encode_answer(ANSWER, finished=self._ends)
        theirs = self._with_bos(self._encode_template(self.turn.whole))
        if theirs[: len(ours)] == ours:
            return
        # White space around an answer may differ, and then how it is cut into tokens: "[/INST] Four </s>".
        texts = [self.tokenizer.decode(ids, skip_special_tokens=False) for ids in (theirs, ours)]
        written, joined, unwritten = ("".join(text.split()) for text in (*texts, self.turn.unwritten))
        if not written.startswith(joined.replace(unwritten, "", 1) if unwritten else joined):
            raise unlike(self._template, *texts)

    def _find_pad(self, table: ModelTable) -> int:
        if table.pad_token:
            return _token_id(self.tokenizer, table.pad_token, "model.pad_token")
        if self.tokenizer.pad_token_id is not None:
            return int(self.tokenizer.pad_token_id)
        logger.info("the tokenizer has no pad token; padding with the end-of-turn (padding is always masked)")
        return self.end_of_turn_id


def _token_id(tokenizer: Any, token: str, key: str) -> int:
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or (index == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise UserError(f"{key}={token!r} is no token of this tokenizer; use one of its special tokens")
    return int(index)


@dataclasses.dataclass(frozen=True)
class GeneratedIds:
    """Generated ids without the stop token; `finished` is False when the limit cut them off."""

    ids: list[int]
    finished: bool
