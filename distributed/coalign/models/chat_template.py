"""A tokenizer's chat template: conversations as text, at a fixed date, and every failure in one line.

A template is a program that comes with a model. Its first conversations are rendered in a process with limits. Knows no
token ids.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from coalign.errors import UserError
from coalign.limited_call import TooMuchError, call_limited

Messages = Sequence[Mapping[str, str]]
MAX_LENGTH = 1_000_000  # characters that a template may write around short messages
MEND = "mend it, or set model.chat_template to a file with another one"
_FUNCTION = "strftime_now"  # what transformers gives to templates that write the date


class ChatTemplate:
    """Renders conversations. `date` (YYYY-MM-DD) is what a template that writes today's date sees.

    Raises UserError when the tokenizer has several templates and none is the default.
    """

    def __init__(self, tokenizer: Any, name: str, date: str) -> None:
        self.tokenizer, self.name, self.date, self.has_date = tokenizer, name, date, False
        try:
            self.source: str = tokenizer.get_chat_template()
        except Exception as error:  # of a list of templates, transformers raises more than one kind
            raise self._failure(error) from error
        self.has_date = _FUNCTION in self.source
        self._fixed = _date_macro(date, self.source) + self.source if self.has_date else self.source

    def render(self, messages: Messages, **options: Any) -> str:
        """Return a conversation as text. Raises UserError for whatever the template raises."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, chat_template=self._fixed, **options
            )
        except Exception as error:  # a template can raise anything: ZeroDivisionError, RecursionError
            raise self._failure(error) from error
        return text

    def render_first(self, conversations: Sequence[tuple[Messages, Mapping[str, Any]]]) -> list[str | UserError]:
        """Return each conversation (messages, options) as text, or the error of one that fails.

        They are rendered in a process of its own. Raises UserError for a template that takes more time or memory than
        CPU_SECONDS and MEMORY_BYTES allow, or writes more than MAX_LENGTH characters.
        """
        try:
            found = call_limited(lambda: [self._text_or_error(*conversation) for conversation in conversations])
        except TooMuchError as error:
            raise UserError(f"the chat template ({self.name}) {error} for one short message; {MEND}") from error
        long = [row["length"] for row in found if row.get("length", 0) > MAX_LENGTH]
        if long:
            raise UserError(
                f"the chat template ({self.name}) writes {long[0]} characters for one short message (at most"
                f" {MAX_LENGTH}); {MEND}"
            )
        return [UserError(row["error"]) if "error" in row else row["text"] for row in found]

    def _text_or_error(self, messages: Messages, options: Mapping[str, Any]) -> dict[str, Any]:
        try:
            text = self.render(messages, **options)
        except UserError as error:
            return {"error": str(error)}
        return {"length": len(text), "text": text[:MAX_LENGTH]}

    def _failure(self, error: Exception) -> UserError:
        line = f", line {error.lineno - self.has_date}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        if isinstance(error, MemoryError):
            said = "it needs too much memory"
        else:
            said = " ".join(str(error).split())[:300] or type(error).__name__
            if not isinstance(error, jinja2.TemplateError | ValueError | TypeError):
                said = f"{type(error).__name__}, {said}"
        return UserError(f"the chat template ({self.name}{line}) can't write a user's message: {said}; {MEND}")


def today() -> str:
    """Return today's date, UTC, as YYYY-MM-DD."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _date_macro(date: str, source: str) -> str:
    """Return a macro that stands in a line before the template and hides the function that reads the clock."""
    day = datetime.datetime.fromisoformat(date)
    used = sorted(set(re.findall(r"%-?[A-Za-z]", source)))
    replaced = "".join(f"|replace({directive!r}, {day.strftime(directive)!r})" for directive in used)
    return f"{{% macro {_FUNCTION}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"
