"""`recipe`: the format that matrix products are computed in. bf16 is everywhere; others need their hardware."""

from __future__ import annotations

import importlib.util

import torch
from transformers import PreTrainedModel

from surogate.config.train import TrainConfig
from trainer_svc.worker.errors import config_error
from trainer_svc.worker.model.modeling import device
from trainer_svc.worker.quantized.record import skipped_layers

FP8_CAPABILITY = (8, 9)
"""Of the first GPUs with FP8 matrix products."""

MULTIPLE = 16
"""What the sides of a matrix must be a multiple of for FP8 products."""

INSTEAD = "use recipe: bf16"


def check(train: TrainConfig) -> None:
    """Raises ConfigError where the recipe cannot run, with what it needs and what to use instead."""
    if train.recipe == "nvfp4":
        raise config_error(
            "recipe",
            "nvfp4 computes on GPUs of compute capability 10.0 and above (Blackwell), and training in it was never "
            f"tried there; {INSTEAD}, or qlora_fp4: true to store the base in NVFP4",
        )
    if train.recipe == "fp8_hybrid":
        where = device(train)
        if where.type != "cuda" or torch.cuda.get_device_capability(where) < FP8_CAPABILITY:
            raise config_error(
                "recipe",
                "fp8_hybrid needs a GPU of compute capability 8.9 or above (Ada, Hopper, Blackwell) and torchao, and "
                f"training is on {_described(where)}; {INSTEAD}, or qlora_fp8: true to store the base in FP8",
            )
        if importlib.util.find_spec("torchao") is None:
            raise config_error("recipe", f"fp8_hybrid needs torchao: pip install torchao==0.18.0; or {INSTEAD}")


def use_recipe(model: PreTrainedModel, train: TrainConfig, *, emulate: bool = False) -> None:
    """Has linear layers, not the output head, compute as the recipe says; `emulate`: in float32, rounded alike.

    fp8_hybrid: E4M3 for activations and weights, E5M2 for gradients, one scale a tensor, that of the tensor at hand.
    """
    if train.recipe != "fp8_hybrid":
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-untyped]

    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    kept = [f".{name}." for name in skipped_layers(train, layers)]

    def takes(module: torch.nn.Module, name: str) -> bool:
        return (
            isinstance(module, torch.nn.Linear)
            and ".layers." in f".{name}."
            and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0
            and not any(other in f".{name}." for other in kept)
        )

    convert_to_float8_training(model, module_filter_fn=takes, config=Float8LinearConfig(emulate=emulate))


def _described(where: torch.device) -> str:
    if where.type != "cuda":
        return "the CPU"
    major, minor = torch.cuda.get_device_capability(where)
    return f"{torch.cuda.get_device_name(where)} ({major}.{minor})"
