"""Keys of train.yaml: the optimiser, its schedule, memory, parallelism and precision."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from surogate.config import keys
from surogate.config.base import (
    ConfigModel,
    Count,
    Devices,
    Float,
    Fraction,
    NonNegative,
    Positive,
    Size,
    one_of,
    problem,
    refuse,
    spelled,
)

Beta = Annotated[Float, Field(ge=0, lt=1)]


OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "normuon": "normuon",
}
"""Spellings of optimisers."""

Optimizer = Annotated[Literal["adamw_8bit", "adamw", "normuon"], spelled(OPTIMIZERS)]


class OptimizerKeys(ConfigModel):
    """The optimiser and its learning rate over time."""

    optimizer: Optimizer = "adamw_8bit"
    """Optimiser: adamw_8bit (AdamW whose moments have 8 bits, by bitsandbytes; those of weights with less than 4,096
    elements are float32), adamw, or normuon (NorMuon for matrices, AdamW for embeddings, heads and vectors).
    """
    learning_rate: NonNegative = 2e-4
    """Highest learning rate, ≥ 0. 0 trains nothing."""
    lr_scheduler_type: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """Learning rate after the warm-up: falls linearly, as a cosine, stays and then falls in cooldown_steps (wsd), or
    stays.
    """
    warmup_ratio: Fraction = 0.0
    """Fraction of the steps in which the learning rate rises from 0, 0 to 1."""
    warmup_steps: Count = 0
    """Steps in which the learning rate rises from 0, ≥ 0. Unless 0, it overrides warmup_ratio."""
    cooldown_steps: Count = 0
    """Last steps of `wsd` in which the learning rate falls, ≥ 0."""
    final_lr_fraction: Fraction = 0.0
    """Learning rate at the end, as a fraction of learning_rate, 0 to 1. Also spelled min_lr_ratio."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of matrices, ≥ 0; biases and norms have none."""
    max_grad_norm: NonNegative = 1.0
    """Norm to which gradients are clipped, ≥ 0. 0 = no clipping."""
    adamw_beta1: Beta = 0.9
    """Decay of AdamW's first moment, 0 to below 1."""
    adamw_beta2: Beta = 0.999
    """Decay of AdamW's second moment, 0 to below 1."""
    adamw_epsilon: Positive = 1e-8
    """Term in AdamW's denominator, > 0."""
    normuon_momentum: Beta = 0.95
    """Momentum of normuon, 0 to below 1."""
    normuon_beta2: Beta = 0.95
    """Decay of the mean square that normuon keeps for each row of a matrix, 0 to below 1."""
    normuon_cautious_wd: bool = True
    """Whether normuon decays weights only where its update would make them smaller too."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        steps = getattr(self, "max_steps", -1)
        both = self.warmup_steps + self.cooldown_steps
        if steps > 0 and both > steps:
            message = f"warmup_steps and cooldown_steps are {both} steps together, more than max_steps ({steps})"
            refuse("train", [problem("warmup_steps" if self.warmup_steps else "cooldown_steps", message)])
        return self


def _is_recompute(value: object) -> bool:
    return isinstance(value, bool) or value == "selective"


class MemoryKeys(ConfigModel):
    """Time for memory."""

    recompute: Annotated[bool | Literal["selective"], one_of(_is_recompute, "must be true, false or selective")] = True
    """Keep only the inputs of layers and compute the rest again for the gradient: less memory, about a third more
    time. `selective` keeps the results of matrix products and attention too: most of the time is won back for part of
    the memory. Worth turning off (false) on CPU and for small models.
    """
    lmhead_chunks: Annotated[Size, Field(le=65_536)] = 1
    """Parts in which logits and loss are computed, 1 to 65,536: more parts, less memory for logits. It is a lower
    bound: no more than 32 MiB of logits are made at a time on CPU, 1 GiB on a GPU.
    """
    offload_optimizer: bool = False
    """Keep the optimiser's state in host memory; each weight's is on the device only while that weight is updated. Same
    result, slower steps. No meaning on a CPU.
    """
    cpu_training: bool = False
    """Train on the CPU, also where there is a GPU."""


class DistributedKeys(ConfigModel):
    """Several nodes."""

    block: ClassVar[str] = "distributed."
    without_effect: ClassVar[frozenset[str]] = keys.DISTRIBUTED_WITHOUT_EFFECT

    num_nodes: Annotated[Devices, Field(ge=1)] = 1
    """Nodes that train together, 1 to 1,024. More than one need MASTER_ADDR and MASTER_PORT in the environment of each.
    """
    gpus_per_node: Devices = 0
    """GPUs of each node, 0 to 1,024. 0 = gpus."""


def _is_zero_level(value: object) -> bool:
    return type(value) is int and value in (1, 2, 3)


class ParallelKeys(ConfigModel):
    """Several devices."""

    gpus: Devices = 1
    """GPUs that train together, a process for each, 0 to 1,024. 0 = all. On a machine without a GPU, or with
    cpu_training: the number of processes on the CPU (0 = one).
    """
    zero_level: Annotated[Literal[1, 2, 3], one_of(_is_zero_level, "must be 1, 2 or 3")] = 1
    """What is in shares over the GPUs: the optimiser's state (1), gradients and trained weights too, which stay whole
    from a layer's forward to its backward pass (2), or all weights, whole only while their layer computes (3).
    """
    distributed: DistributedKeys = DistributedKeys()
    """Several nodes."""

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        """With several processes, what is known not to work in shares is refused."""
        if self.gpus == 1 and self.distributed.num_nodes == 1 and self.distributed.gpus_per_node in (0, 1):
            return self
        problems = []
        if getattr(self, "offload_optimizer", False):
            problems.append(problem("offload_optimizer", "is for one GPU; over several, zero_level shares the state"))
        for key, free in (("master_dtype", (None, "fp32")), ("gradient_dtype", (None,))):
            if getattr(self, key, None) not in free:
                problems.append(problem(key, "is for one GPU; over several, zero_level shares weights and gradients"))
        refuse("train", problems)
        return self


RECIPES = {"fp8-hybrid": "fp8_hybrid", "bfloat16": "bf16"}
"""Other spellings of recipes."""
Format = Annotated[Literal["fp32", "bf16"], spelled({"float32": "fp32", "bfloat16": "bf16"})]


class PrecisionKeys(ConfigModel):
    """Number formats of training."""

    recipe: Annotated[Literal["bf16", "fp8_hybrid", "nvfp4"], spelled(RECIPES)] = "bf16"
    """Format of matrix products: bf16 (float32 with torch_dtype float32); fp8_hybrid (E4M3, gradients E5M2; a GPU of
    compute capability 8.9 or above, and torchao); or nvfp4 (a GPU of 10.0 or above). The latter two: PT and SFT.
    """
    master_dtype: Format | None = None
    """Dtype of the weights that are trained, in memory: fp32, or bf16 (full fine-tuning and PT on one GPU), which takes
    half the memory; steps are float32 all the same, and rounded at random. null = fp32.
    """
    gradient_dtype: Format | None = None
    """Dtype in which gradients are added up and kept: fp32, or bf16 (one GPU). null = that of the weights."""
    fp8_amax_history: Annotated[Size, Field(le=1 << 20)] = 16
    """Steps over which scales of fp8_hybrid look back, 1 to 1,048,576. Without effect: they are those of the tensor at
    hand.
    """
    skip_quant_first_layers: Annotated[Count, Field(le=10_000)] = 0
    """First layers that are left as they are, 0 to 10,000 (QLoRA, fp8_hybrid, nvfp4)."""
    skip_quant_last_layers: Annotated[Count, Field(le=10_000)] = 0
    """Last layers that are left as they are, 0 to 10,000 (QLoRA, fp8_hybrid, nvfp4). The output head always is."""

    @model_validator(mode="after")
    def _formats_fit(self) -> Self:
        problems = []
        if self.master_dtype == "bf16" and getattr(self, "lora", False):
            problems.append(problem("master_dtype", "is for full fine-tuning and PT; lora_dtype is that of adapters"))
        if self.master_dtype == "bf16" and getattr(self, "torch_dtype", "auto") in ("float32", "float16"):
            problems.append(problem("master_dtype", "is bf16, and needs torch_dtype: bfloat16"))
        if self.recipe != "bf16" and getattr(self, "quantizes", False):
            problems.append(problem("recipe", f"must be bf16 with QLoRA, got {self.recipe}"))
        if self.recipe != "bf16" and getattr(self, "torch_dtype", "auto") in ("float32", "float16"):
            problems.append(problem("recipe", f"is {self.recipe}, and needs torch_dtype: bfloat16"))
        refuse("train", problems)
        return self
