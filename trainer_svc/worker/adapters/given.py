"""Adapters that a user names: read, held against the model, and added to its weights.

What is wrong with one is a ValueError in words; the caller knows the key or the flag that named it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

FAILURES = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError)
"""What peft and its readers end with when an adapter is damaged, or is for another model."""


def check_files(folder: Path) -> None:
    """Raises ValueError unless the folder has a LoRA adapter whose files can be read."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        hint = ""
        if (folder / WEIGHTS_FILE).with_suffix(".bin").is_file():
            hint = "; it has a .bin: load it with peft's PeftModel and save it again with save_pretrained"
        raise ValueError(f"{folder} is not a PEFT adapter's folder: it has no {' and no '.join(missing)}{hint}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not a JSON object: {error}") from error
    if kind != "LORA":
        raise ValueError(f"{folder} is a {kind} adapter; only LORA can be used")
    try:
        weights_in(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged: {error}; get the file again") from error


def weights_in(folder: Path) -> set[str]:
    """Names of an adapter's weights."""
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        return set(file.keys())


def add_adapter(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Adds the products of an adapter to the weights of `model`, in float32, one layer after the other, then rounded
    once to `dtype`. Raises one of FAILURES if it does not fit.
    """
    adapted = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
    _check_names(adapted, folder)
    _check_tied(adapted)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.float()
            module.merge(safe_merge=True)
            module.to(dtype)
    return adapted.merge_and_unload()


def first_line(error: Exception) -> str:
    """The first line of what an error says, and the next where the first only announces it; else its kind."""
    text = str(error.args[0] if error.args else error).strip()
    lines = text.splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def _check_tied(adapted: PeftModel) -> None:
    """Raises ValueError where a weight that the adapter changes is also another layer's, which would change with it."""
    bases = {name: base for name, module in adapted.named_modules() if (base := _changed(module)) is not None}
    own = {id(base) for base in bases.values()}
    elsewhere = {
        other.data_ptr()
        for module in adapted.modules()
        if id(module) not in own
        for other in module._parameters.values()
        if other is not None
    }
    for name, base in bases.items():
        weight = base.get_parameter("weight")
        if weight.data_ptr() in elsewhere:
            raise ValueError(f"it adapts {name}, whose weights another layer shares; serve the adapter unmerged")


def _changed(module: torch.nn.Module) -> torch.nn.Module | None:
    """The layer of the base that a module of the adapter changes, or stands in for; None for other modules."""
    if isinstance(module, ModulesToSaveWrapper):
        original: torch.nn.Module = module.original_module
        return original if hasattr(original, "weight") else None
    if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):  # experts are shared with nobody
        base: torch.nn.Module = module.get_base_layer()
        return base
    return None


def _check_names(adapted: PeftModel, folder: Path) -> None:
    """Raises ValueError for weights that have no place in the model, and for layers without weights."""
    odd = sorted(weights_in(folder) ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False)))
    if odd:
        raise ValueError(f"they differ in {', '.join(odd[:4])}")
