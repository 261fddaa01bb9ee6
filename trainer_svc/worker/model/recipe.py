"""`recipe`: the format that matrix products are computed in. bf16 is everywhere; others need their hardware."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from surogate.config.train import TrainConfig
from trainer_svc.worker.errors import config_error
from trainer_svc.worker.model.modeling import device
from trainer_svc.worker.nvfp4 import product
from trainer_svc.worker.nvfp4.linear import Nvfp4Linear
from trainer_svc.worker.nvfp4.proof import fault_of
from trainer_svc.worker.quantized.record import skipped_layers

INSTEAD = "use recipe: bf16"

PROOF_TOKENS = 512
"""Of the products, in the sizes of a model's layers, that are compared with exact ones before training."""


@dataclass(frozen=True)
class Needs:
    """What a recipe needs: the compute `capability` of the first GPUs with such products, their `names`, what else,
    sides of matrices that are multiples of `multiple`; and what to use where it is lacking.
    """

    capability: tuple[int, int]
    names: str
    also: str
    multiple: int
    storage: str


NEEDS = {
    "fp8_hybrid": Needs(
        (8, 9), "Ada, Hopper, Blackwell", " and torchao", 16, "qlora_fp8: true to store the base in FP8"
    ),
    "nvfp4": Needs((10, 0), "Blackwell", "", product.MULTIPLE, "qlora_fp4: true to store the base in NVFP4"),
}


def check(train: TrainConfig) -> None:
    """Raises ConfigError where the recipe cannot run, with what it needs and what to use instead."""
    needs, where = NEEDS.get(train.recipe), device(train)
    if needs is None:
        return
    if where.type != "cuda" or torch.cuda.get_device_capability(where) < needs.capability:
        major, minor = needs.capability
        raise config_error(
            "recipe",
            f"{train.recipe} needs a GPU of compute capability {major}.{minor} or above ({needs.names}){needs.also}, "
            f"and training is on {_described(where)}; {INSTEAD}, or {needs.storage}",
        )
    if train.recipe == "fp8_hybrid" and importlib.util.find_spec("torchao") is None:
        raise config_error("recipe", f"fp8_hybrid needs torchao: pip install torchao==0.18.0; or {INSTEAD}")
    if train.recipe == "nvfp4":
        _refuse(fault_of(product.by_card, where), where)


def use_recipe(model: PreTrainedModel, train: TrainConfig, *, emulate: bool = False) -> None:
    """Has linear layers, not the output head, compute as the recipe says; `emulate`: in float32, rounded alike.

    fp8_hybrid: E4M3 for activations and weights, E5M2 for gradients, one scale a tensor, that of the tensor at hand.
    nvfp4: see `trainer_svc.worker.nvfp4`. Raises ConfigError where no layer would, and for a card with wrong products.
    """
    needs = NEEDS.get(train.recipe)
    if needs is None:
        return
    takes = _choice(model, train, needs.multiple)
    names = [name for name, module in model.named_modules() if takes(module, name)]
    if not names:
        why = f"no linear layer of the {type(model).__name__} that skip_quant_* leaves has sides of multiples of"
        raise config_error("recipe", f"is {train.recipe}, and {why} {needs.multiple}; {INSTEAD}")
    if train.recipe == "fp8_hybrid":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-untyped]

        convert_to_float8_training(model, module_filter_fn=takes, config=Float8LinearConfig(emulate=emulate))
        return
    for name in names:
        model.set_submodule(name, Nvfp4Linear(model.get_submodule(name), product.exact if emulate else product.by_card))
    if not emulate:
        sides = {(layer.in_features, layer.out_features) for layer in map(model.get_submodule, names)}
        sizes = [(PROOF_TOKENS, *pair) for pair in sorted(sides)]
        _refuse(fault_of(product.by_card, model.device, sizes), model.device)


def _choice(model: PreTrainedModel, train: TrainConfig, multiple: int) -> Callable[[torch.nn.Module, str], bool]:
    """Whether a module of a name is a linear layer of the decoder that computes by the recipe."""
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    kept = [f".{name}." for name in skipped_layers(train, layers)]

    def takes(module: torch.nn.Module, name: str) -> bool:
        return (
            isinstance(module, torch.nn.Linear)
            and ".layers." in f".{name}."
            and module.in_features % multiple == module.out_features % multiple == 0
            and not any(other in f".{name}." for other in kept)
        )

    return takes


def _refuse(fault: str | None, where: torch.device) -> None:
    if fault is not None:
        raise config_error("recipe", f"nvfp4 does not compute as it must on {_described(where)}: {fault}; {INSTEAD}")


def _described(where: torch.device) -> str:
    if where.type != "cuda":
        return "the CPU"
    major, minor = torch.cuda.get_device_capability(where)
    return f"{torch.cuda.get_device_name(where)} ({major}.{minor})"
