"""Keys of train.yaml: LoRA and QLoRA."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from surogate.config.base import ConfigModel, Float, Rank, Text, one_of, problem, refuse, spelled


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Modules = Annotated[list[Text], BeforeValidator(_as_list), Field(min_length=1)]


ALL_LINEAR, EXPERTS = "all", "experts"
"""What `lora_target_modules` may name beside layers: all linear ones, and the fused weights of a mixture's experts."""


class LoraKeys(ConfigModel):
    """Adapters, and which weights are trained without them."""

    lora: bool = True
    """Train LoRA adapters and leave the model's own weights as they are. Default true for SFT and GRPO, false for
    PT.
    """
    lora_rank: Rank = 16
    """Rank of the adapters, 1 to 65,536."""
    lora_alpha: Rank = 32
    """Scale of the adapters, 1 to 65,536: they are multiplied by lora_alpha / lora_rank."""
    lora_dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.05
    """Dropout before the adapters, 0 to below 1. 0 in GRPO, whatever is set, as is the model's own: the policy that is
    trained is the one that was sampled.
    """
    lora_dtype: Annotated[Literal["fp32", "bf16"], spelled({"float32": "fp32", "bfloat16": "bf16"})] = "fp32"
    """Dtype of the adapters while they are trained."""
    lora_target_modules: Modules = Field(["all"])
    """Names of the linear layers that get adapters, such as q_proj. `all` = every linear layer but the output head,
    which may be named beside it. In a mixture of experts that is neither the router nor the experts' weights, which are
    one tensor a layer: `experts` beside `all` adapts those too (lora_dropout: 0; not over several GPUs). In GRPO
    inference serves no adapters on experts and embeddings: it is given weights with the adapter merged into them.
    """
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


BASE_FOLDER = "base"
"""Folder in output_dir of the base under the adapter, where it is not the model that the configuration names: a merged
or, in GRPO, a quantised one.
"""

BNB_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class QloraKeys(ConfigModel):
    """Quantised base weights under LoRA. One storage at the most; all run on every CPU and GPU."""

    qlora_bnb: bool = False
    """Store the base weights in NF4, by bitsandbytes: 4.1 bits a weight."""
    qlora_bnb_block_size: Annotated[
        int, one_of(lambda value: value in BNB_BLOCK_SIZES, f"must be one of {', '.join(map(str, BNB_BLOCK_SIZES))}")
    ] = 64
    """Weights that share a scale in NF4: 32, 64, 128, … 4096."""
    qlora_bnb_double_quant: bool = True
    """Store the scales of NF4 in 8 bits."""
    qlora_fp8: bool = False
    """Store the base weights in E4M3 with a scale for each square of qlora_block_size: 8 bits a weight."""
    qlora_fp4: bool = False
    """Store the base weights in NVFP4, E2M1 with an E4M3 scale for each 16: 4.5 bits a weight."""
    qlora_block_size: Annotated[int, Field(ge=1, le=4096)] = 128
    """Rows and columns of the squares of weights that share a scale in FP8, 1 to 4096."""
    qlora_four_over_six: bool = True
    """NVFP4: for each block let its largest weight be 6 or 4, whichever leaves the smaller error."""

    @property
    def quantizes(self) -> bool:
        """Whether the base weights are stored quantised."""
        return self.qlora_bnb or self.qlora_fp8 or self.qlora_fp4

    @model_validator(mode="after")
    def _one_storage_under_lora(self) -> Self:
        chosen = [name for name in ("qlora_bnb", "qlora_fp8", "qlora_fp4") if getattr(self, name)]
        if not chosen:
            return self
        problems = [problem(name, f"cannot be combined with {chosen[0]}: choose one") for name in chosen[1:]]
        if not getattr(self, "lora", True):
            problems.append(problem(chosen[0], "needs lora: true: quantised weights are not trained"))
        if getattr(self, "from_scratch", False):
            problems.append(problem(chosen[0], "needs trained weights, and from_scratch is true"))
        refuse("train", problems)
        return self
