"""Conversations that go on: what follows a turn of the model, token by token, for several forms of chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator_svc.grpo.rollouts.tokenizer import ChatTokenizer
from surogate.errors import ConfigError
from surogate.v1 import common_pb2
from tests.helpers.grpo.grpo_job import write_tokenizer
from tests.helpers.models.tiny import PLAIN_CHAT_TEMPLATE, make_tiny_tokenizer

EOS = 1

THINKING = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content.split('</think>')[-1].lstrip('\n') if loop.index0 < ns.last else m.content %}
    {%- if m.role == 'assistant' and loop.index0 > ns.last and '</think>' not in content %}
        {%- set content = '<think>\n\n</think>\n\n' + content %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
"""Thoughts are shown after the last user message only, as in Qwen3."""

TOOLS_AS_JSON = """{%- for m in messages %}
    {%- if m.role == 'tool' %}{{- '<|im_start|>result\n' + (m.content | tojson) + '<|im_end|>' }}
    {%- else %}{{- '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"""
"""Trims, and quotes what tools say, as in Llama 3.1."""

NO_END = (
    "{% for m in messages %}{{ '\\n' + m.role + ': ' + m.content }}{% endfor %}"
    "{{ '\\nassistant: ' if add_generation_prompt }}"
)
"""Turns have no token at their end."""

SYSTEM_LAST = """{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '[' + (messages[0].content + ' ' if loop.last else '') + m.content + ']' }}
    {%- elif m.role == 'assistant' %}{{- m.content + '<|im_end|>' }}{%- endif %}
{%- endfor %}"""
"""Moves the system message into the last user message, as early Mistral models do."""

ALTERNATING = PLAIN_CHAT_TEMPLATE.replace(
    "{{- message['content'] +",
    "{%- if message.role not in ['user', 'assistant'] %}{{ raise_exception('only users speak') }}{% endif %}"
    "{{- message['content'] +",
)


def messages(*pairs: tuple[str, str]) -> list[common_pb2.ChatMessage]:
    return [common_pb2.ChatMessage(role=role, content=content) for role, content in pairs]


def tokenizer_with(folder: Path, template: str) -> ChatTokenizer:
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return ChatTokenizer.load(str(folder))


PROMPT = (("system", "Be brief."), ("user", "Guess."))
TURNS = (("assistant", "fünf?"), ("user", "Higher."), ("assistant", "7 🙂"))
ANSWERS = [(("user", ' Lower "now".'),), (("tool", 'it is\n"4"'),), (("tool", "4"), ("user", "Go on."))]


@pytest.mark.parametrize("template", [PLAIN_CHAT_TEMPLATE, THINKING, TOOLS_AS_JSON])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("turns", [TURNS[:1], TURNS])
def test_it_is_what_transformers_renders_for_the_whole_conversation(
    tmp_path: Path, template: str, answer: Any, turns: Any
) -> None:
    from transformers import AutoTokenizer

    make_tiny_tokenizer(tmp_path, chat_template=template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    as_dicts = [{"role": role, "content": content} for role, content in (*PROMPT, *turns, *answer)]
    expected = theirs.apply_chat_template(as_dicts, add_generation_prompt=True, return_dict=False)
    ours = ChatTokenizer.load(str(tmp_path))
    ids = ours.encode_answer(messages(*PROMPT), messages(*turns), messages(*answer), EOS)
    assert expected[-len(ids) :] == ids
    ended = theirs.encode(turns[-1][1], add_special_tokens=False)
    assert expected[: -len(ids)][-len(ended) - 1 :] == [*ended, EOS], "what comes before is the turn and its end"


def test_thoughts_stay_where_they_were_sampled(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, THINKING)
    thought = messages(("assistant", "<think>\nhm\n</think>\n\n5"))
    ids = tokenizer.encode_answer(messages(*PROMPT), thought, messages(("user", "No.")), EOS)
    assert text(tokenizer, ids) == "\n<|im_start|>user\nNo.<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("last_id", [0, 40])
def test_a_turn_that_ended_otherwise_is_closed_as_the_template_does(tmp_path: Path, last_id: int) -> None:
    tokenizer = tokenizer_with(tmp_path, PLAIN_CHAT_TEMPLATE)
    ids = tokenizer.encode_answer(messages(*PROMPT), messages(("assistant", "x")), messages(("user", "No.")), last_id)
    assert text(tokenizer, ids).startswith("<|im_end|>\n<|im_start|>user\nNo.")


def test_a_template_without_end_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, NO_END)
    ids = tokenizer.encode_answer(messages(*PROMPT), messages(("assistant", "x")), messages(("user", "No.")), EOS)
    assert text(tokenizer, ids) == "\nuser: No.\nassistant: "


@pytest.mark.parametrize(
    ("template", "role", "why"),
    [
        (SYSTEM_LAST, "user", "renders the prompt differently"),
        (ALTERNATING, "tool", "only users speak"),
        (PLAIN_CHAT_TEMPLATE.replace("for message in messages", "for message in messages if message.role != 'tool'"),
         "tool", "does not show what messages of role tool say"),
        (PLAIN_CHAT_TEMPLATE.replace("message['content'] +", "message['content'] * 2 +"), "user", "once, as it is"),
    ],
)  # fmt: skip
def test_templates_that_cannot_go_on_are_refused(tmp_path: Path, template: str, role: str, why: str) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    prompt = PROMPT[1:] if template == ALTERNATING else PROMPT
    with pytest.raises(ConfigError, match=why) as caught:
        tokenizer.encode_answer(messages(*prompt), messages(("assistant", "x")), messages((role, "y")), EOS)
    assert [item.field for item in caught.value.violations] == ["model"]


def text(tokenizer: ChatTokenizer, ids: list[int]) -> str:
    """The ids as text, special tokens kept."""
    return str(tokenizer._tokenizer.decode(ids, skip_special_tokens=False))


def test_ids_are_plain_integers(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, PLAIN_CHAT_TEMPLATE)
    ids = tokenizer.encode_answer(messages(*PROMPT), messages(*TURNS), messages(("user", "y")), EOS)
    assert json.loads(json.dumps(ids)) == ids
