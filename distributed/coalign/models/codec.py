"""Text to token ids and back: chat template, exactly one BOS, a trained end-of-turn, the length of the context.

Everything behind it carries token ids. Knows a tokenizer, no model weights.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import jinja2

from coalign.config import ModelTable
from coalign.errors import UserError
from coalign.prompts import PLAIN_TEMPLATE
from coalign.runs.digests import digest_value

logger = logging.getLogger("coalign")

_SENTINEL = "text0sentinel"


class Codec:
    """Turns prompts and answers into token ids, the same way for training, sampling and scoring.

    Prompt and answer are encoded apart and joined as ids, so that training sees the ids that generation produces.
    `stop_ids` end an answer; `max_tokens` is the context in tokens. Raises UserError for a chat template that can't be
    used, a special token that the tokenizer lacks, or `model.max_tokens` beyond the model's context.
    """

    def __init__(self, tokenizer: Any, table: ModelTable) -> None:
        self.tokenizer = tokenizer
        self._template = table.chat_template or "the tokenizer's own"
        if not tokenizer.chat_template:
            logger.info("the tokenizer has no chat template; using a plain instruction / response form")
            tokenizer.chat_template = PLAIN_TEMPLATE
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self.bos_id: int | None = self._default_bos()
        self.end_of_turn_id = self._find_end_of_turn(table)
        self.pad_id = self._find_pad(table)
        if table.max_tokens > tokenizer.model_max_length:
            raise UserError(
                f"model.max_tokens={table.max_tokens} is more than the model's context of {tokenizer.model_max_length}"
                f" tokens; use {tokenizer.model_max_length} or less (0: all of it)"
            )
        self.max_tokens = int(table.max_tokens or tokenizer.model_max_length)
        self.stop_ids = sorted({self.end_of_turn_id, tokenizer.eos_token_id} - {None})

    def digest(self) -> str:
        """Return a digest of everything that decides which ids a text becomes."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = fast.to_str() if fast is not None else sorted(self.tokenizer.get_vocab().items())
        own = [self.tokenizer.chat_template, self.bos_id, self.end_of_turn_id, self.max_tokens]
        return digest_value([type(self.tokenizer).__name__, rules, *own])

    @property
    def end_of_turn(self) -> str:
        """Return the token that ends an answer."""
        token: str = self.tokenizer.convert_ids_to_tokens(self.end_of_turn_id)
        return token

    def encode_prompt(self, user_text: str) -> list[int]:
        """Return the ids of a user's message up to where the answer begins, with one BOS where the model has one."""
        if self._special.search(user_text):
            # "</s>" in the data is text and must not end a turn, so it is encoded apart from the template's own tokens.
            pieces = self._render([{"role": "user", "content": _SENTINEL}], add_generation_prompt=True).split(_SENTINEL)
            ids = self._encode_template(pieces[0])
            for piece in pieces[1:]:
                ids += self.encode_plain(user_text) + self._encode_template(piece)
        else:
            rendered = self._render([{"role": "user", "content": user_text}], add_generation_prompt=True)
            ids = self._encode_template(rendered)
        if self.bos_id is not None:
            while len(ids) > 1 and ids[0] == ids[1] == self.bos_id:
                ids = ids[1:]
            if not ids or ids[0] != self.bos_id:
                ids = [self.bos_id, *ids]
        return ids

    def encode_answer(self, text: str, finished: bool = True) -> list[int]:
        """Return the ids of an answer, followed by the end-of-turn when `finished`."""
        return [*self.encode_plain(text), *([self.end_of_turn_id] if finished else [])]

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
        """
        finish = "stop" if finished else "length"
        return {"text": self.decode(ids), "finish": finish, "num_tokens": len(ids) + finished}

    def _render(self, messages: list[dict[str, str]], **options: bool) -> str:
        """Return a conversation rendered by the chat template. Raises UserError when the template fails."""
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)
        except (jinja2.TemplateError, TypeError) as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise UserError(
                f"the chat template ({self._template}{line}) can't write a user's message: {error}; mend it, or set"
                " model.chat_template to a file with another one"
            ) from error
        return text

    def _default_bos(self) -> int | None:
        """Return the BOS id when the tokenizer or the template puts one before a text, else None."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return None
        ids = self.tokenizer("x").input_ids
        template_has_it = self._render([{"role": "user", "content": "x"}]).startswith(self.tokenizer.bos_token)
        return int(bos) if template_has_it or (ids and ids[0] == bos) else None

    def _find_end_of_turn(self, table: ModelTable) -> int:
        tokenizer = self.tokenizer
        rendered = self._render([{"role": "user", "content": "hello"}, {"role": "assistant", "content": _SENTINEL}])
        if _SENTINEL not in rendered:
            raise UserError(
                "the chat template drops the assistant's answer, so nothing could be trained; set model.chat_template"
                " to a file with a template that renders it"
            )
        if table.end_of_turn:
            return _token_id(tokenizer, table.end_of_turn, "model.end_of_turn")
        tail = self._encode_template(rendered.rpartition(_SENTINEL)[2].strip())
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if tail and tail[0] in special:
            return tail[0]
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has neither an end-of-turn in its chat template nor an EOS token; name one with"
                " model.end_of_turn"
            )
        logger.info(
            "end of turn: the tokenizer's EOS %r (the chat template ends an answer without one)", tokenizer.eos_token
        )
        return int(tokenizer.eos_token_id)

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
