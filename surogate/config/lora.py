"""Keys of train.yaml: LoRA and QLoRA."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from surogate.config.base import ConfigModel, Float, Size, Text, planned, problem, refuse, spelled


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Modules = Annotated[list[Text], BeforeValidator(_as_list), Field(min_length=1)]


class LoraKeys(ConfigModel):
    """Adapters, and which weights are trained without them."""

    lora: bool = True
    """Train LoRA adapters and leave the model's own weights as they are. Default true for SFT and GRPO, false for
    PT.
    """
    lora_rank: Size = 16
    """Rank of the adapters, ≥ 1."""
    lora_alpha: Size = 32
    """Scale of the adapters, ≥ 1: they are multiplied by lora_alpha / lora_rank."""
    lora_dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.05
    """Dropout before the adapters, 0 to below 1. 0 in GRPO, whatever is set: the policy that is trained is the one
    that was sampled.
    """
    lora_dtype: Annotated[Literal["fp32", "bf16"], spelled({"float32": "fp32", "bfloat16": "bf16"})] = "fp32"
    """Dtype of the adapters while they are trained."""
    lora_target_modules: Modules = Field(["all"])
    """Names of the linear layers that get adapters, such as q_proj. `all` = every linear layer but the output head."""
    train_embeddings: bool = True
    """Train the embeddings too (PT and full fine-tuning); false freezes them. No meaning with LoRA."""
    train_lm_head: bool = True
    """Train the output head too (PT and full fine-tuning); false freezes it. No meaning with LoRA."""
    adapter_path: Text | None = None
    """Folder of a PEFT adapter to start from. Needs lora: true. Not in GRPO, where sampler and trainer share a base:
    merge it first.
    """
    adapter_init_mode: Literal["merge", "trainable"] = "merge"
    """What becomes of adapter_path: merged into the base under a new adapter, or trained further (same rank, alpha
    and modules).
    """
    merge_adapter: bool = False
    """Also write the model with the trained adapter merged into it, at the end."""

    @model_validator(mode="after")
    def _adapter_needs_lora(self) -> Self:
        if self.lora:
            return self
        given = [name for name in ("adapter_path", "merge_adapter") if getattr(self, name)]
        refuse("train", (problem(name, "needs lora: true, and lora is false") for name in given))
        return self


class QloraKeys(ConfigModel):
    """Quantised base weights under LoRA."""

    qlora_bnb: bool = planned(False)
    """NF4 base weights."""
    qlora_bnb_block_size: int = planned(64)
    """Weights that share a scale in NF4."""
    qlora_bnb_double_quant: bool = planned(True)
    """Quantise the scales of NF4 too."""
    qlora_fp8: bool = planned(False)
    """FP8 base weights."""
    qlora_fp4: bool = planned(False)
    """NVFP4 base weights."""
    qlora_block_size: int = planned(128)
    """Weights that share a scale in FP8."""
    qlora_four_over_six: bool = planned(True)
    """Choose between two scales per block in NVFP4."""
