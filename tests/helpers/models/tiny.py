"""Tiny models and tokenizers for tests: a Qwen3 of some 100,000 parameters over a byte-level vocabulary.

torch and transformers are imported when a maker is called, so that torch-free tests may import this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

PAD, EOS, START, UNKNOWN = "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<unk>"
SPECIAL_TOKENS = (PAD, EOS, START, UNKNOWN)
"""Ids 0 to 3; byte b of UTF-8 text has an id from 4 on, one token a byte."""

VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML with generation markers: the assistant's words and its `<|im_end|>` are what it learns."""

PLAIN_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
"""The same text without markers."""


def make_tiny_tokenizer(
    directory: str | Path | None = None, *, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Makes a byte-level tokenizer (one token a byte, no merges) and saves it in `directory` if given."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    fast.chat_template = chat_template
    if directory is not None:
        fast.save_pretrained(directory)
    return fast


def make_tiny_model(
    directory: str | Path | None = None,
    *,
    layers: int = 2,
    hidden: int = 64,
    vocab_size: int = VOCAB_SIZE,
    max_position_embeddings: int = 512,
    tie_word_embeddings: bool = True,
    seed: int = 0,
    dtype: str = "float32",
    std: float = 0.02,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Qwen3ForCausalLM:
    """Makes a random Qwen3 and its tokenizer and saves both in `directory` if given, for vLLM and transformers.

    `hidden` must be a multiple of 32 (heads have 32 dimensions, key-value heads are half as many where that is whole).
    `vocab_size` may exceed the tokenizer's. A greater `std` of the weights makes distributions less uniform.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = max(hidden // 32, 1)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=32,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=std,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    if directory is not None:
        model.save_pretrained(directory)
        make_tiny_tokenizer(directory, chat_template=chat_template)
    return model


def make_counting(folder: Path, **model: Any) -> Path:
    """A tiny model in `folder`, and beside it `data.jsonl`, 200 lines of text that count."""
    make_tiny_model(folder, **model)
    rows = [json.dumps({"text": f"{n} sheep and {n + 1} goats"}) for n in range(200)]
    (folder / "data.jsonl").write_text("\n".join(rows))
    return folder


def make_tiny_adapter(
    directory: str | Path, model_directory: str | Path, *, rank: int = 8, alpha: int = 16, seed: int = 0
) -> None:
    """Saves a LoRA adapter for the model, on all linear layers, with a B that is not zero: it changes something."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(base, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(directory)
