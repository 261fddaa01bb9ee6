"""LoRA adapters by PEFT: attached to a model, read, and named as PEFT and vLLM expect."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors.torch import load_file
from transformers import PreTrainedModel

from surogate.config.train import TrainConfig
from surogate.storage.fetch import local
from trainer_svc.worker.adapters.given import FAILURES, WEIGHTS_FILE, add_adapter, check_files, first_line
from trainer_svc.worker.adapters.lora_float import use_float_layers
from trainer_svc.worker.adapters.lora_targets import adapted_name, bare, is_adapters, targets
from trainer_svc.worker.adapters.product import product
from trainer_svc.worker.errors import config_error
from trainer_svc.worker.paths import is_local
from trainer_svc.worker.quantized.linear import QuantizedLinear
from trainer_svc.worker.quantized.state import decoded_state, weight_of
from trainer_svc.worker.shares import collected, collects, whole


def merge_adapter(model: PreTrainedModel, path: str, key: str = "adapter_path") -> PreTrainedModel:
    """Adds an adapter's product to the base weights and drops it. Raises ConfigError for one that does not fit."""
    folder = adapter_folder(path, key)
    try:
        return add_adapter(model, folder, model.dtype)
    except FAILURES as error:
        raise config_error(key, f"the adapter {folder} does not fit the model: {first_line(error)}") from error


def attach(model: PreTrainedModel, train: TrainConfig, *, dropout: float) -> PeftModel:
    """Wraps every layer that `lora_target_modules` names with a fresh adapter: B = 0, A random by `train_seed`.

    Base weights are frozen. Raises ConfigError when a name matches no layer.
    """
    torch.manual_seed(train.train_seed)
    config = LoraConfig(
        r=train.lora_rank,
        lora_alpha=train.lora_alpha,
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
        **targets(model, train, dropout),
    )
    try:
        adapter = get_peft_model(model, config)
    except ValueError as error:
        raise config_error("lora_target_modules", first_line(error)) from error
    adapter.peft_config["default"].base_model_name_or_path = base_name(train)
    _set_dtype(adapter, train.lora_dtype)
    use_float_layers(model, adapter)
    return adapter


def load_weights(adapter: PeftModel, folder: Path, *, resumed: bool = False) -> None:
    """Fills the adapter with the weights in `folder`: those of `adapter_path`, or of a checkpoint that is gone on from.

    Raises ConfigError if rank, scale or layers are others.
    """
    anew = "; make them equal" + (", or set resume_from_checkpoint: false to start anew" if resumed else "")
    given = PeftConfig.from_pretrained(str(folder))
    own = adapter.peft_config["default"]
    for name, yaml_key in (("r", "lora_rank"), ("lora_alpha", "lora_alpha")):
        if getattr(given, name) != getattr(own, name):
            raise config_error(
                yaml_key,
                f"is {getattr(own, name)}, and the adapter {folder} has {getattr(given, name)}{anew}",
            )
    odd = [name for name in PLAIN if getattr(given, name, None)]
    if odd:
        raise config_error(
            "adapter_init_mode", f"is trainable, and the adapter {folder} has {', '.join(odd)}; set it to merge"
        )
    state = load_file(folder / WEIGHTS_FILE)
    expected = set(get_peft_model_state_dict(adapter))
    if set(state) != expected:
        differing = ", ".join(sorted(set(state) ^ expected)[:4])
        key, hint = ("lora_target_modules", anew) if resumed else ("adapter_path", "")
        raise config_error(key, f"the adapter {folder} is for other layers; they differ in {differing}{hint}")
    try:
        set_peft_model_state_dict(adapter, state)
    except RuntimeError as error:
        text = f"the adapter {folder} is for a model of other sizes: {first_line(error)}"
        raise config_error("adapter_path" if not resumed else "model", text) from error
    if not all(torch.isfinite(weight).all() for weight in state.values()):
        raise config_error("adapter_path", f"the adapter {folder} has weights that are not finite; choose another")


PLAIN = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias")
"""Settings of an adapter that change what its weights mean; those that are made here have none of them."""


def tensors(adapter: PeftModel, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The adapter's weights by PEFT's names, as they are in `adapter_model.safetensors`, in `dtype` if given: on rank 0
    (see `shares.collected`).
    """
    state = collected(get_peft_model_state_dict(adapter, save_embedding_layers=False), dtype)
    return {name: weight.to(dtype or weight.dtype).contiguous() for name, weight in state.items()}


def base_state(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The weights under the adapter's layers, by their names in the bare model; of quantised ones what they mean, in
    `dtype`. On rank 0 (see `shares.collected`).
    """
    return {bare(name): value for name, value in decoded_state(model, dtype).items() if not is_adapters(name)}


def merged_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The same with the adapter's products added, in float32 where they are; the model itself is left as it is."""
    state = base_state(model)
    for name, weight in merged_weights(model):
        if collects():
            state[name] = weight.to(state[name].device)
        del weight  # before the next is gathered
    return state


def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that adapters are on, W + s·B·A in float32, by their names in the bare model. All ranks must ask."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = whole(_adapted_weight(module)).float()
            yield adapted_name(name, module), (weight + product(module)).contiguous()


def changed_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What differs from the model as named, in `dtype` and host memory: merged weights, and what quantised ones mean.

    Names are those of the bare model. All ranks must ask for it, and rank 0 gets it (see `shares.collected`).
    """
    state = {}
    for name, weight in itertools.chain(_decoded_weights(model, dtype), merged_weights(model)):
        if collects():
            state[name] = weight.to(dtype).cpu()
        del weight
    return state


def _decoded_weights(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            yield bare(f"{name}.weight"), layer.full_weight(dtype)


def _adapted_weight(module: LoraLayer) -> torch.Tensor:
    """The weight under an adapter; of a quantised layer what it means."""
    if isinstance(module, ParamWrapper):
        weight: torch.Tensor = module.get_param().detach()
        return weight
    return weight_of(module.get_base_layer())


def config_json(adapter: PeftModel) -> str:
    """PEFT's adapter_config.json for inference."""
    config = adapter.peft_config["default"].to_dict()
    config["inference_mode"] = True
    return json.dumps(config, indent=2, sort_keys=True, default=_plain)


def adapter_folder(path: str, key: str) -> Path:
    """The folder of an adapter, whose files can be read. Raises ConfigError naming `key`."""
    folder = Path(local(path, f"train.{key}")).expanduser()
    try:
        check_files(folder)
    except ValueError as error:
        raise config_error(key, str(error)) from error
    return folder


def base_name(train: TrainConfig) -> str:
    """How the adapter's files name the base: an absolute path, or the name on the hub."""
    return str(Path(train.model).expanduser().resolve()) if is_local(train.model) else train.model


def _set_dtype(adapter: PeftModel, lora_dtype: str) -> None:
    dtype = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
    for weight in adapter.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(dtype[lora_dtype])


def _plain(value: object) -> object:
    """Sets and enumerations, as PEFT itself writes them."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", str(value))
