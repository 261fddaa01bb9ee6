"""Chat templates, rendered as transformers' `apply_chat_template` does, without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from surogate.errors import ConfigError, Violation
from surogate.structs import from_struct
from surogate.v1 import common_pb2

Message = Mapping[str, Any]

_MARK = "\ue000turn\ue001"
"""Stands for the text of a message where only what the template puts around it matters."""

_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template may fail with: its own refusals, and mistakes in it that show with these messages only."""


class ChatTemplate:
    """A compiled template and the special tokens that it may name (`bos_token`, `eos_token`, …)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ConfigError for a template that does not compile."""
        self._special_tokens = dict(special_tokens)
        self._shown: set[tuple[str, ...]] = set()
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError.of([Violation("model", f"the chat template does not compile: {error}")]) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as the text that the model reads.

        Raises:
            ConfigError: The template refuses the messages, or fails on them.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except _REFUSALS as error:
            why = f"the chat template refuses the prompt: {error}{_hint(messages, error)}"
            raise ConfigError.of([Violation("model", why)]) from error

    def continuation(self, prompt: Sequence[Message], turns: Sequence[Message], answer: Sequence[Message]) -> str:
        """What follows the text of the assistant's turn that `turns` ends with: the end of that turn, the answer, and
        the opening of the assistant's next turn. `turns` are the messages after the prompt.

        Raises:
            ConfigError: A conversation cannot go on so: the template refuses it, rewrites what was said before, or
                leaves out what the answer says.
        """
        spoken = [*turns[:-1], {**turns[-1], "content": _MARK}]
        before, found, after = self.render([*prompt, *spoken, *answer]).partition(_MARK)
        if not found or _MARK in after:
            raise _cannot_go_on("it does not render the assistant's turn once, as it is")
        if not before.startswith(self.render(prompt, add_generation_prompt=False)):
            raise _cannot_go_on("it renders the prompt differently once there is an answer to it")
        self._check_shown([*prompt, *spoken], [str(message["role"]) for message in answer])
        return after

    def _check_shown(self, conversation: Sequence[Message], roles: Sequence[str]) -> None:
        """Makes sure, once for the same roles, that messages of these roles are shown."""
        if tuple(roles) in self._shown:
            return
        text = self.render([*conversation, *({"role": role, "content": _MARK} for role in roles)])
        if text.count(_MARK) != 1 + len(roles):
            raise _cannot_go_on(f"it does not show what messages of role {' and '.join(roles)} say")
        self._shown.add(tuple(roles))


def _hint(messages: Sequence[Message], error: Exception) -> str:
    """What to do where a template takes no system message, as Gemma's."""
    if "system" in str(error).lower() and any(message.get("role") == "system" for message in messages):
        return "; put what the system message says at the beginning of the user's, or set train.template to another"
    return ""


def _cannot_go_on(why: str) -> ConfigError:
    return ConfigError.of([Violation("model", f"the chat template cannot be used for several turns: {why}")])


def as_messages(prompt: Sequence[common_pb2.ChatMessage]) -> list[dict[str, Any]]:
    """Messages as templates take them: role, content, and the further fields beside them."""
    return [{"role": m.role, "content": m.content, **from_struct(m.extra)} for m in prompt]


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's words for training masks; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(lineno)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:  # noqa: A002 - the name that templates use
    return datetime.now().strftime(format)
