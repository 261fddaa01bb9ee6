"""A small model of the Qwen3 architecture, and its tokenizer: one token a byte, and a handful for the conversation.

Only what describes them is written, in the form of a Hugging Face model's folder: the pretraining makes the weights
(`from_scratch: true`), from its own seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
"""Ids 0 to 4; each byte of UTF-8 text has an id from 5 on."""

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|end|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
"""The generation markers say what fine-tuning learns: the assistant's words and the token that ends them."""

CONTEXT = 256
"""Longest sequence, in tokens."""

HEAD = 32
"""Dimensions of an attention head; two query heads share a key-value head."""


def make_model(directory: Path, *, layers: int = 3, hidden: int = 256) -> int:
    """Writes the configuration of a model and its tokenizer into `directory`; returns the number of parameters.

    `hidden` is a multiple of 64.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(directory)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD // 2,
        "head_dim": HEAD,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
    }
    _write(directory / "config.json", config)
    attention = 2 * hidden * hidden + 2 * hidden * (hidden // 2) + 2 * HEAD
    layer = attention + 3 * hidden * (3 * hidden) + 2 * hidden
    return tokenizer.get_vocab_size() * hidden + layers * layer + hidden


def make_tokenizer(directory: Path) -> Tokenizer:
    """Writes the tokenizer's files into `directory`, as transformers, vLLM and `tokenizers` load them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write(directory / "tokenizer_config.json", described)
    return tokenizer


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
