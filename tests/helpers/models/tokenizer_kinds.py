"""Tokenizers of the kinds that published models have, trained on a few sentences, with templates in their manner."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's gone in 1234 seconds.",
    "Grüße: 你好, мир! It'll be fine; they're here, aren't they?",
    "def reverse(text):\n    return text[::-1]\n\n\tprint(reverse('abc'))",
    "user assistant system tool name content think answer question",
] * 4
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3_CHAT = (
    "{{- bos_token }}{%- set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set said = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set said = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + day + '\\n\\n' + said + '<|eot_id|>' }}"
    "{%- if tools is not none and tools is defined %}{{- tools | tojson(indent=4) }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'system' %}"
    "{{ '<<SYS>>\\n' + message['content'].strip() + '\\n<</SYS>>\\n\\n' }}{% else %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKING_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
PLAIN_CHAT = (
    "{% for m in messages %}{{ m.role | upper + ': ' + m.content + (eos_token if m.role == 'assistant' else '') "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class TokenizerKind:
    """How one is made: `train()` gives the tokenizer, `template` and `config` what its folder says beside it."""

    train: Callable[[], Tokenizer]
    template: str | None
    config: dict[str, Any] = field(default_factory=dict)
    systemless: bool = False
    """Whether its template refuses a system message."""


def make_tokenizer(kind: str, folder: Path) -> None:
    """Writes the files of a tokenizer as they are in published repositories."""
    made = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    made.train().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **made.config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if made.template is not None:
        (folder / "chat_template.jinja").write_text(made.template)


def _byte_level(pattern: str, special: list[str], *, bos: str | None = None, prefix: bool = False) -> Tokenizer:
    """Byte-level BPE as GPT-2, Llama 3 and Qwen have it; `bos` is put in front of every text that is no template's."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=bos is not None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos is not None:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
                ),
            ]
        )
    return tokenizer


def _sentencepiece(special: list[str], *, prepend: bool) -> Tokenizer:
    """SentencePiece BPE with bytes for what it does not know: Llama 2 and Mistral (`prepend`), Gemma."""
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=pieces, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator([word for text in CORPUS for word in text.replace(" ", " ▁").split(" ")], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A" if "<s>" in special else "<bos> $A",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "<bos>") if name in special],
    )
    # Bytes are pieces like others, only special tokens are found before the text is cut.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(data))


def _unigram() -> Tokenizer:
    """SentencePiece unigram with a space in front of the text, as T5 and XLM-R have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    eos = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", eos)])
    return tokenizer


def _spaced() -> Tokenizer:
    """Special tokens that have spaces in them, or eat those around them, and one that is a word."""
    tokenizer = _byte_level(GPT2, ["<|end of text|>", "<| turn |>"])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("answer", single_word=True)])
    return tokenizer


CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

KINDS: dict[str, TokenizerKind] = {
    "gpt2": TokenizerKind(
        lambda: _byte_level(GPT2, ["<|endoftext|>"]),
        PLAIN_CHAT,
        {
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "tokenizer_class": "GPT2Tokenizer",
        },
    ),
    "gpt2-prefix-space": TokenizerKind(
        lambda: _byte_level(GPT2, ["<|endoftext|>"], prefix=True), PLAIN_CHAT, {"eos_token": "<|endoftext|>"}
    ),
    "qwen": TokenizerKind(
        lambda: _byte_level(QWEN2, CHATML_TOKENS),
        CHATML,
        {
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "tokenizer_class": "Qwen2Tokenizer",
        },
    ),
    "qwen-thinking": TokenizerKind(
        lambda: _byte_level(QWEN2, CHATML_TOKENS),
        THINKING_CHAT,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": ["<|im_start|>"]},
    ),
    "llama3": TokenizerKind(
        lambda: _byte_level(LLAMA3, HEADERS, bos="<|begin_of_text|>"),
        LLAMA3_CHAT,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "llama2": TokenizerKind(
        lambda: _sentencepiece(["<unk>", "<s>", "</s>"], prepend=True),
        LLAMA2_CHAT,
        {
            "bos_token": {
                "__type": "AddedToken",
                "content": "<s>",
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
            },
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "legacy": False,
            "tokenizer_class": "LlamaTokenizer",
        },
    ),
    "gemma": TokenizerKind(
        lambda: _sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], prepend=False),
        GEMMA_CHAT,
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "tokenizer_class": "GemmaTokenizer",
        },
        systemless=True,
    ),
    "unigram": TokenizerKind(
        _unigram, PLAIN_CHAT, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    ),
    "spaced": TokenizerKind(
        _spaced,
        "{% for m in messages %}{{ '<| turn |>' + m.role + '<think>' + m.content + ' <mask> ' + '<|end of text|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<| turn |>assistant<think>' }}{% endif %}",
        {"eos_token": "<|end of text|>", "mask_token": "<mask>"},
    ),
    "no-special-tokens": TokenizerKind(lambda: _byte_level(GPT2, []), CHATML),
    "no-template": TokenizerKind(lambda: _byte_level(GPT2, ["<|endoftext|>"]), None, {"eos_token": "<|endoftext|>"}),
}
"""By name; `no-template` is a base model's."""
