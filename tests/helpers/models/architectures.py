"""Random models of some 50,000 weights of other architectures than the tiny Qwen3, over the same tokenizer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.helpers.models.tiny import EOS, PAD, SPECIAL_TOKENS, VOCAB_SIZE, make_tiny_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": SPECIAL_TOKENS.index(EOS),
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
}  # fmt: skip
WINDOW = 8
"""Tokens that a sliding window sees: less than the documents of a test have."""

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1,
}  # fmt: skip
VISION: dict[str, Any] = {
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
                      "image_size": 28, "patch_size": 14},
    "mm_tokens_per_image": 4, "boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7,
    "eos_token_id": SPECIAL_TOKENS.index(EOS), "pad_token_id": SPECIAL_TOKENS.index(PAD), "bos_token_id": None,
}  # fmt: skip
WIDER = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
"""For architectures whose heads divide the hidden size between them."""

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "llama": ("Llama", {}),
    "gemma2": (
        "Gemma2",
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "sliding_window": WINDOW,
         "query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        "Gemma3Text",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"],
         "query_pre_attn_scalar": 24},
    ),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    ),
    "gpt-oss": ("GptOss", {"num_experts_per_tok": 2, "num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, **WIDER}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "phi3": ("Phi3", {"rope_parameters": None}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"tie_word_embeddings": True, **MULTIPLIERS}),
    "glm4": ("Glm4", {}),
    "mixtral": ("Mixtral", {"num_experts_per_tok": 2, "num_local_experts": 4}),
    "smollm3": ("SmolLM3", {}),
    "olmoe": ("Olmoe", {"num_experts_per_tok": 2, "num_experts": 4, **WIDER}),
    "cohere": ("Cohere", {}),
    "gemma3-vision": ("Gemma3", {}),
}  # fmt: skip
"""Architectures by name: the class of the configuration, and what differs from SIZES."""

EVERY = os.environ.get("SUROGATE_TEST_MODELS") == "all"
"""Whether tests run all of them (`make test-models`), rather than those that differ in kind."""

ARCHITECTURES = (
    tuple(CONFIGS) if EVERY else ("qwen3", "llama", "gemma2", "gemma3", "mistral", "qwen3-moe", "gpt-oss", "granite")
)
MIXTURES = ("qwen3-moe", "gpt-oss")


def make_model(name: str, folder: Path) -> None:
    """Makes one and saves it with the tokenizer. Everything random that matters is: sinks and routers too."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_config(name), dtype=torch.float32)
        for parameter, weight in model.named_parameters():
            if parameter.endswith(("sinks", "router.bias", "proj.bias", "_bias", "gate.weight")):
                torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    make_tiny_tokenizer(folder)


def _config(name: str) -> PretrainedConfig:
    import transformers

    kind, more = CONFIGS[name]
    if name == "gemma3-vision":
        return transformers.Gemma3Config(text_config={**SIZES, **CONFIGS["gemma3"][1]}, **VISION)
    return getattr(transformers, f"{kind}Config")(**{**SIZES, **more})


def make_mxfp4_model(folder: Path) -> dict[str, torch.Tensor]:
    """Makes a gpt-oss whose experts are stored as in its published checkpoints; returns what those weights mean."""
    import torch
    from safetensors.torch import load_file, save_file

    make_model("gpt-oss", folder)
    state, meant = {}, {}
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    draw = torch.Generator().manual_seed(0)
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            state[name] = weight.bfloat16()
            continue
        experts, inner, outer = weight.shape
        blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8, generator=draw)
        scales = torch.randint(121, 125, (experts, outer, inner // 32), dtype=torch.uint8, generator=draw)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = values[torch.stack([blocks & 15, blocks >> 4], dim=-1).long()].flatten(-2)
        scaled = numbers * torch.exp2(scales.float() - 127)[..., None]
        meant[name] = scaled.flatten(-2).transpose(1, 2).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": plain}}
    (folder / "config.json").write_text(json.dumps(config))
    return meant
