"""What an adapter is on: linear layers, and the weights of experts that are one tensor for all experts of a layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from surogate.config.lora import ALL_LINEAR, EXPERTS
from surogate.config.train import TrainConfig
from trainer_svc.worker.errors import config_error


def targets(model: PreTrainedModel, train: TrainConfig, dropout: float) -> dict[str, Any]:
    """The fields of PEFT's configuration that say what is adapted. Raises ConfigError for `experts` where none fit."""
    names, fused = train.lora_target_modules, _fused_experts(model)
    modules: Any = [name for name in names if name not in (ALL_LINEAR, EXPERTS)]
    _check_names(modules, model)
    if ALL_LINEAR in names:
        by_name = fused or modules or any(_is_special(layer) for layer in model.modules())
        modules = sorted({*_linear_names(model), *modules}) if by_name else "all-linear"
    modules = _in_language_model(modules, model)
    if EXPERTS not in names:
        return {"target_modules": modules}
    if not fused:
        raise config_error("lora_target_modules", f"names {EXPERTS}, and {type(model).__name__} has no fused experts")
    if dropout > 0:
        raise config_error("lora_dropout", f"must be 0 with {EXPERTS} in lora_target_modules: PEFT has none for them")
    parameters = {".".join(name.split(".")[-2:]) for name in fused}
    return {"target_modules": modules, "target_parameters": sorted(parameters)}


def _check_names(modules: Sequence[str], model: PreTrainedModel) -> None:
    """Raises ConfigError for a name that no layer has, which PEFT passes over as long as another one is found."""
    layers = dict(model.named_modules())
    for name in _left_to_modules(modules, model):
        found = [layer for path, layer in layers.items() if path == name or path.endswith(f".{name}")]
        if not found:
            there = ", ".join(_linear_names(model))
            raise config_error("lora_target_modules", f"names {name}, and the model has no such layer; it has {there}")
        if any(_is_special(layer) for layer in found):
            kind = type(found[0]).__name__
            raise config_error(
                "lora_target_modules", f"names {name}, a {kind}, which adapters do not fit; leave it out"
            )


def _left_to_modules(modules: Iterable[str], model: PreTrainedModel) -> list[str]:
    """The names that stay names of modules to PEFT. It takes `gate_proj` and the like for names of a mixture's experts,
    also where a dense layer is called so.
    """
    if not modules:
        return []
    read = LoraConfig(target_modules=set(modules))
    convert_peft_config_for_transformers(read, model, None)
    return sorted(read.target_modules)


def _is_special(layer: torch.nn.Module) -> bool:
    """Whether a linear layer is one of an architecture's own making, such as a router that returns several tensors."""
    return isinstance(layer, torch.nn.Linear) and type(layer).__module__.startswith("transformers.models.")


def _in_language_model(modules: Any, model: PreTrainedModel) -> Any:
    """The targets, kept to the language model where that is a part of one that sees or hears: text trains no more."""
    language = model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is language), "")
    if "." not in prefix:
        return modules
    if modules == "all-linear":
        linear = (name for name, layer in language.named_modules() if isinstance(layer, torch.nn.Linear))
        modules = sorted({name.rpartition(".")[2] for name in linear})
    return rf"{re.escape(prefix)}\..*\b({'|'.join(map(re.escape, modules))})"


def adapts_experts(adapter: PeftModel) -> bool:
    """Whether fused weights of experts have adapters."""
    return any(isinstance(module, ParamWrapper) for module in adapter.modules())


def not_served(adapter: PeftModel) -> str | None:
    """What of it inference serves no adapters on, for people; None if it serves them on all.

    vLLM has adapters on experts for GPUs alone, and by other names; on embeddings it has none.
    """
    if adapts_experts(adapter):
        return "lora_target_modules names experts"
    for name, module in adapter.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), torch.nn.Embedding):
            return f"lora_target_modules names {name.rpartition('.')[2]}, an embedding"
    return None


def check_shared(adapter: PeftModel) -> None:
    """Raises ConfigError for an adapter on an embedding or an output head that have one matrix between them: a sampler
    has no place for a second one, which either would be with its product."""
    model = adapter.get_base_model()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding.weight is not head.weight:
        return
    for name, module in adapter.named_modules():
        if isinstance(module, LoraLayer) and (module is embedding or module is head):
            what = (
                f"names {name.rpartition('.')[2]}: embedding and output head are one matrix, and inference has no place"
            )
            instead = "leave it out of lora_target_modules, or train all weights with lora: false"
            raise config_error("lora_target_modules", f"{what} for a second one; {instead}")


def adapted_name(name: str, module: LoraLayer) -> str:
    """Name, in the model without adapters, of the weight that `module`, called `name`, adapts."""
    return bare(f"{name}.{module.parameter_name if isinstance(module, ParamWrapper) else 'weight'}")


def bare(name: str) -> str:
    """A weight's name in the model without adapters. A layer may lie in several wrappers."""
    return re.sub(r"(\.base_layer)+\.", ".", name)


def is_adapters(name: str) -> bool:
    """Whether a weight is an adapter's own."""
    return any(part.startswith("lora_") for part in name.split("."))


def remark(adapter: PeftModel, train: TrainConfig) -> str | None:
    """What `all` does not reach in a mixture of experts, for people; None if that is nothing."""
    model = adapter.get_base_model()
    if ALL_LINEAR not in train.lora_target_modules or not _fused_experts(model):
        return None
    reached = {adapted_name(*item) for item in model.named_modules() if isinstance(item[1], LoraLayer)}
    embeddings = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    left = {
        re.sub(r"^.*?\.\d+\.", "", bare(name)).removesuffix(".weight")
        for name, weight in model.named_parameters()
        if weight.dim() >= 2 and not name.endswith("bias") and not is_adapters(name) and id(weight) not in embeddings
        if bare(name) not in reached
    }
    hint = "" if EXPERTS in train.lora_target_modules else f"; add {EXPERTS} to adapt the experts' weights"
    return f"train.lora_target_modules: no adapter is on {', '.join(sorted(left))}{hint}" if left else None


def _fused_experts(model: PreTrainedModel) -> list[str]:
    """Names of weights [experts, …]."""
    return [name for name, weight in model.named_parameters() if weight.dim() == 3 and ".experts." in name]


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of linear layers, without the output head, that adapters fit and PEFT takes as such."""
    head = model.get_output_embeddings()
    return _left_to_modules(
        {
            name.rpartition(".")[2]
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head and not _is_special(layer)
        },
        model,
    )
