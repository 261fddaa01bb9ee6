"""What of a conversation is learned: by markers, by comparing prefixes, and what cannot be told is an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from surogate.errors import InvalidInputError
from tests.helpers.models.tiny import CHAT_TEMPLATE, EOS, PLAIN_CHAT_TEMPLATE, make_tiny_tokenizer
from trainer_svc.worker.data.chat import ChatRenderer, PlainRenderer, Rendered
from trainer_svc.worker.data.encode import encode

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "abc"},
    {"role": "assistant", "content": "cba"},
    {"role": "user", "content": "xyz"},
    {"role": "assistant", "content": "zyx é"},
]

FORGETFUL = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' }}"
    "{%- if m['role'] == 'assistant' and not loop.last %}{{- 'forgotten' }}{%- else %}{{- m['content'] }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Renders all answers but the last differently, as templates that drop old reasoning do."""


DROPS_OLD_THOUGHTS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' }}"
    "{%- if m['role'] == 'assistant' and loop.last %}{{- '<think>' + m.thought|default('') + '</think>' }}{%- endif %}"
    "{{- m['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Shows what an answer was thought over for the last one alone, as reasoning models' templates do."""


def learned_texts(rendered: Rendered) -> list[str]:
    assert rendered.learned is not None
    return [rendered.text[start:end] for start, end in rendered.learned]


def renderer(template: str, **options: object) -> ChatRenderer:
    return ChatRenderer(make_tiny_tokenizer(chat_template=template), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE], ids=["markers", "prefixes"])
def test_the_answers_and_their_ends_are_learned(template: str) -> None:
    assert learned_texts(renderer(template).render(CHAT)) == ["cba<|im_end|>", "zyx é<|im_end|>"]


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE, FORGETFUL], ids=["markers", "prefixes", "odd"]
)
def test_last_round(template: str) -> None:
    assert learned_texts(renderer(template, loss_scale="last_round").render(CHAT)) == ["zyx é<|im_end|>"]


def test_all_is_learned_on_request() -> None:
    assert renderer(CHAT_TEMPLATE, loss_scale="all").render(CHAT).learned is None


def test_a_template_that_hides_answers_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match=r"message 2 differently.*generation.*last_round"):
        renderer(FORGETFUL).render(CHAT)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE], ids=["markers", "prefixes"])
def test_the_response_prefix_is_rendered_and_not_learned(template: str) -> None:
    rendered = renderer(template, response_prefix="Sure: ").render(CHAT)
    assert "assistant\nSure: cba" in rendered.text
    assert learned_texts(rendered) == ["cba<|im_end|>", "zyx é<|im_end|>"]


def test_without_an_answer_nothing_is_learned() -> None:
    assert renderer(CHAT_TEMPLATE).render(CHAT[:2]).learned == ()


def test_what_the_template_refuses_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match=r"chat template refuses.*no such luck"):
        renderer("{{ raise_exception('no such luck') }}").render(CHAT[:2])


def test_plain_texts_are_joined_and_answers_end() -> None:
    rendered = PlainRenderer(make_tiny_tokenizer()).render(CHAT)
    assert rendered.text == "Be brief.\nabc\ncba<|im_end|>xyz\nzyx é<|im_end|>"
    assert learned_texts(rendered) == ["cba<|im_end|>", "zyx é<|im_end|>"]


def test_tokens_are_learned_exactly_where_their_text_is() -> None:
    tokenizer = make_tiny_tokenizer()
    rendered = renderer(CHAT_TEMPLATE).render(CHAT)
    (document,) = encode([rendered], tokenizer, raw_text=False)
    assert tokenizer.decode(document.token_ids) == rendered.text
    assert tokenizer.decode(document.token_ids[document.mask]) == "cba<|im_end|>zyx é<|im_end|>"
    official = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert document.token_ids.tolist() == official["input_ids"]
    assert np.array_equal(document.mask, np.array(official["assistant_masks"], dtype=bool))


def test_an_answer_that_loses_its_thoughts_when_others_follow_is_learned_as_it_stands() -> None:
    rendered = renderer(DROPS_OLD_THOUGHTS).render(CHAT)
    assert learned_texts(rendered) == ["cba<|im_end|>", "<think></think>zyx é<|im_end|>"]
    assert rendered.text.count("<think>") == 1


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
WITH_TOOLS = [
    {"role": "user", "content": "How much?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "Bye."},
]


def template_of_trl(name: str) -> str:
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def test_tool_calls_are_learned_with_the_template_of_qwen3() -> None:
    rendered = renderer(template_of_trl("qwen3")).render(WITH_TOOLS, TOOLS)
    assert '"name": "f"' in rendered.text
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    assert learned_texts(rendered) == [call, "Three.<|im_end|>", "<think>\n\n</think>\n\nBye.<|im_end|>"]


@pytest.mark.parametrize(("name", "end"), [("qwen2_5", EOS), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>")])
def test_prefixes_and_markers_tell_the_same(name: str, end: str) -> None:
    """TRL ships models' templates as they are, and with markers, which may take in the blanks around an answer."""
    found = []
    for template in (name, f"{name}_training"):
        tokenizer = make_tiny_tokenizer(chat_template=template_of_trl(template))
        tokenizer.add_special_tokens({"eos_token": end, "bos_token": "<s>"})
        rendered = ChatRenderer(tokenizer).render(CHAT[1:])
        (document,) = encode([rendered], tokenizer, raw_text=False)
        found.append((rendered.text, [text.strip() for text in learned_texts(rendered)], document.token_ids.tolist()))
    assert found[0] == found[1]


def test_last_round_by_markers_does_not_depend_on_how_the_history_is_rendered() -> None:
    marked = DROPS_OLD_THOUGHTS.replace(
        "{{- m['content'] + '<|im_end|>\\n' }}",
        "{%- generation %}{{- m['content'] }}{%- endgeneration %}{{- '<|im_end|>\\n' }}",
    )
    rendered = renderer(marked, loss_scale="last_round").render([CHAT[1], CHAT[2], CHAT[2], CHAT[4]])
    assert learned_texts(rendered) == ["zyx é"]
