"""Chat templates and tokenizers give exactly what transformers gives, without transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator_svc.grpo.rollouts.template import ChatTemplate
from orchestrator_svc.grpo.rollouts.tokenizer import ChatTokenizer
from surogate.errors import ConfigError
from surogate.v1 import common_pb2
from tests.helpers.grpo.grpo_job import write_tokenizer
from tests.helpers.models.tiny import CHAT_TEMPLATE, make_tiny_tokenizer

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "reverse: abc"}],
    [{"role": "system", "content": 'Be <brief> & "kind".'}, {"role": "user", "content": "Grüße, 你好 🙂"}],
    [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "  and\n\ntwo lines \n"},
    ],
    [{"role": "user", "content": "who?", "name": "ada", "tags": ["a", "b"], "age": 36}],
]

LLAMA = """{%- set loop_messages = messages -%}
{%- for message in loop_messages %}
    {%- if loop.index0 == 0 %}{{ bos_token }}{% endif %}
    {{- '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"""
BLOCKS = """
  {% for m in messages %}
    {% if m.role == 'system' %}
      {% continue %}
    {% endif %}
[{{ m.role }}] {{ m.content }}
  {% endfor %}
  {% if tools %}tools{% endif %}
"""
JSON = "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}{{ documents is none }}"
STATE = (
    "{% set ns = namespace(last='') %}{% for m in messages %}{% set ns.last = m.role %}{% endfor %}"
    "{{ ns.last }}{{ messages[-1].content[::-1] }}{{ strftime_now('%Y') }}"
)
MACRO = (
    "{% macro say(m) %}{% generation %}<{{ m.role }}>{{ m.content }}{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA, BLOCKS, JSON, STATE, MACRO])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_templates_render_as_in_transformers(template: str, messages: list[dict[str, Any]]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **special)
    assert ChatTemplate(template, special).render(messages) == rendered[0]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_prompts_have_the_ids_of_apply_chat_template(tmp_path: Path, messages: list[dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    make_tiny_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ours = ChatTokenizer.load(str(tmp_path))
    assert ours.encode_prompts([as_proto(messages)]) == [expected]


def test_special_tokens_are_left_out_of_completions(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_tiny_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = [*theirs.encode(" Grüße 你好 , x"), theirs.eos_token_id]
    assert ChatTokenizer.load(str(tmp_path)).decode([np.array(ids, np.int32)]) == [" Grüße 你好 , x"]


def test_numbers_and_structures_of_a_message_reach_the_template() -> None:
    message = common_pb2.ChatMessage(role="user", content="who?")
    message.extra.update({"age": 36, "share": 0.5, "tags": [1, "a"]})
    from orchestrator_svc.grpo.rollouts.template import as_messages

    assert (
        ChatTemplate("{{ messages[0].age }} {{ messages[0].share }} {{ messages[0].tags }}", {}).render(
            as_messages([message])
        )
        == "36 0.5 [1, 'a']"
    )


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses the prompt"),
        ("{{ messages.append(1) }}", "refuses the prompt"),
        ("{{ ''.__class__.__mro__ }}", "refuses the prompt"),
    ],
)
def test_a_template_that_refuses_says_so(template: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ChatTemplate(template, {}).render([{"role": "user", "content": "x"}])


def test_a_template_that_is_wrong_says_so() -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        ChatTemplate("{% for %}", {})


def test_templates_come_from_tokenizer_config_too(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ eos_token }}"}]
    config = {"chat_template": named, "eos_token": {"content": "<|im_end|>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    prompt = as_proto([{"role": "user", "content": "x"}])
    assert ChatTokenizer.load(str(tmp_path)).encode_prompts([prompt]) == [[1]]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        ChatTokenizer.load(str(tmp_path))
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        ChatTokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        ChatTokenizer.load(str(tmp_path))


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, orchestrator_svc.grpo.job; "
        "sys.exit(bool({'torch', 'vllm', 'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def as_proto(messages: list[dict[str, Any]]) -> list[common_pb2.ChatMessage]:
    protos = []
    for message in messages:
        proto = common_pb2.ChatMessage(role=message["role"], content=message["content"])
        proto.extra.update({key: value for key, value in message.items() if key not in ("role", "content")})
        protos.append(proto)
    return protos
