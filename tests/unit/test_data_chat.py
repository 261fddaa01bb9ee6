"""What of a conversation is learned: by markers, by comparing prefixes, and what cannot be told is an error."""

from __future__ import annotations

import numpy as np
import pytest

from surogate.errors import InvalidInputError
from tests.helpers.tiny import CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE, make_tiny_tokenizer
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
