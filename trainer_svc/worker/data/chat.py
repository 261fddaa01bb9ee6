"""Renders conversations and finds, to the character, what of them is learned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from surogate.errors import InvalidInputError
from trainer_svc.worker.errors import config_error

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template may fail with: its own refusals, and mistakes in it that show with these messages only."""

Message = Mapping[str, Any]
Span = tuple[int, int]
LossScale = Literal["default", "last_round", "all"]


@dataclass(frozen=True)
class Rendered:
    """Text, and the half-open ranges of characters whose tokens are learned; None means all of it.

    `special_tokens`: the tokenizer adds the tokens that it puts around every text (a template writes its own).
    """

    text: str
    learned: tuple[Span, ...] | None
    special_tokens: bool = False


class ChatRenderer:
    """A chat template, and what of its output is learned.

    With `{% generation %}` markers in the template, what they enclose is what an assistant's message contributes.
    Without, it is what the rendering gains from the message over the prompt that asks for it. Within a conversation a
    template may leave out what it puts in front of a last answer (old reasoning): what is there of it is learned. That
    the rest is a plain continuation is checked, and where it is not the error says what to do.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        loss_scale: LossScale = "default",
        response_prefix: str | None = None,
    ) -> None:
        template = tokenizer.get_chat_template()
        self._template: str = template
        self._specials = tokenizer.special_tokens_map
        self._eos: str = tokenizer.eos_token or ""
        self._loss_scale = loss_scale
        self._prefix = response_prefix or ""
        self._marked = GENERATION_MARKER.search(template) is not None

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """Renders a conversation. Raises InvalidInputError if the template refuses it or hides what is learned."""
        chat = [self._prefixed(message) for message in messages]
        if self._loss_scale == "all":
            return Rendered(self._text(chat, tools), None)
        answers = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
        if not answers:
            return Rendered(self._text(chat, tools), ())
        wanted = answers[-1:] if self._loss_scale == "last_round" else answers
        text, spans = self._by_markers(chat, tools, wanted) if self._marked else self._by_prefixes(chat, tools, wanted)
        return Rendered(text, tuple(self._after_prefix(text, span) for span in spans))

    def _by_markers(
        self, chat: Sequence[Message], tools: Sequence[Any] | None, wanted: Sequence[int]
    ) -> tuple[str, list[Span]]:
        texts, spans = self._call(chat, tools, return_assistant_tokens_mask=True)
        text: str = texts[0]
        found = [(int(start), int(end)) for start, end in spans[0] if end > start]
        if self._loss_scale == "last_round":
            found = found[self._count_marked(chat[: wanted[0]], tools) :]
        return text, found

    def _count_marked(self, chat: Sequence[Message], tools: Sequence[Any] | None) -> int:
        """How many marked ranges the answers of a conversation have."""
        if not chat:
            return 0
        _, spans = self._call(chat, tools, return_assistant_tokens_mask=True)
        return sum(end > start for start, end in spans[0])

    def _by_prefixes(
        self, chat: Sequence[Message], tools: Sequence[Any] | None, wanted: Sequence[int]
    ) -> tuple[str, list[Span]]:
        text = self._text(chat, tools)
        spans = []
        for index in wanted:
            prompt = self._text(chat[:index], tools, prompt=True) if index else ""
            answered = self._text(chat[: index + 1], tools)
            if not text.startswith(answered):
                # The answer as it is once others follow: the prompt, then an end of what it was as the last one.
                gained = answered[len(prompt) :] if answered.startswith(prompt) else ""
                kept = _overlap(gained, text[len(prompt) :]) if text.startswith(prompt) else ""
                answered = prompt + kept if kept.strip() else ""
            if not answered.startswith(prompt) or len(answered) == len(prompt):
                raise InvalidInputError(
                    f"the chat template renders message {index} differently within the whole conversation, so that "
                    "what is to be learned cannot be told; give a `template` with {% generation %} markers, or set "
                    "loss_scale to last_round or all"
                )
            spans.append((len(prompt), len(self._up_to_end(answered))))
        return text, spans

    def _up_to_end(self, answered: str) -> str:
        """Without the blanks that a template puts after the end-of-sequence token."""
        bare = answered.rstrip()
        return bare if self._eos and bare.endswith(self._eos) else answered

    def _prefixed(self, message: Message) -> dict[str, Any]:
        found = {name: value for name, value in message.items() if value is not None}
        if self._prefix and found["role"] == "assistant":
            found["content"] = self._prefix + str(found.get("content", ""))
        return found

    def _after_prefix(self, text: str, span: Span) -> Span:
        if not self._prefix:
            return span
        place = text.find(self._prefix, *span)
        if place < 0:
            raise InvalidInputError("the chat template changes response_prefix; choose another one, or null")
        return place + len(self._prefix), span[1]

    def _text(self, chat: Sequence[Message], tools: Sequence[Any] | None, *, prompt: bool = False) -> str:
        if not chat:
            return ""
        texts, _ = self._call(chat, tools, add_generation_prompt=prompt)
        return str(texts[0])

    def _call(self, chat: Sequence[Message], tools: Sequence[Any] | None, **options: Any) -> tuple[Any, Any]:
        try:
            return render_jinja_template(  # type: ignore[no-any-return]
                [list(chat)], tools=tools, chat_template=self._template, **options, **self._specials
            )
        except TemplateSyntaxError as error:
            raise config_error("template", f"is not a Jinja template: line {error.lineno}: {error.message}") from error
        except _REFUSALS as error:
            raise InvalidInputError(f"the chat template refuses the conversation: {error}") from error


def _overlap(a: str, b: str) -> str:
    """The longest text that `a` ends and `b` begins with."""
    return next((a[place:] for place in range(len(a)) if b.startswith(a[place:])), "")


class PlainRenderer:
    """Joins the texts of the messages, a line each, with an end-of-sequence token after each of the assistant's."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        loss_scale: LossScale = "default",
        response_prefix: str | None = None,
    ) -> None:
        self._eos: str = tokenizer.eos_token or ""
        self._loss_scale = loss_scale
        self._prefix = response_prefix or ""

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """Renders a conversation; tools have no place in it."""
        del tools
        text, spans = "", []
        for message in messages:
            content = str(message.get("content") or "")
            if message["role"] == "assistant":
                text += self._prefix
                spans.append((len(text), len(text) + len(content) + len(self._eos)))
                text += content + self._eos
            else:
                text += content + "\n"
        if self._loss_scale == "all":
            return Rendered(text, None, special_tokens=True)
        return Rendered(text, tuple(spans[-1:] if self._loss_scale == "last_round" else spans), special_tokens=True)
