"""Loads the model that a session trains, or makes a fresh one from a configuration."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config, PretrainedConfig, PreTrainedModel

from surogate.config.train import TrainConfig
from surogate.errors import ConfigError
from trainer_svc.worker.device.memory import freed_at_once
from trainer_svc.worker.errors import config_error
from trainer_svc.worker.model.apart import check_apart
from trainer_svc.worker.model.attention import use_packed_attention
from trainer_svc.worker.model.damage import damage
from trainer_svc.worker.model.norm import use_few_passes
from trainer_svc.worker.model.precision import Precision, has_bfloat16
from trainer_svc.worker.model.rope import apply_context
from trainer_svc.worker.paths import is_local, model_source
from trainer_svc.worker.quantized.loading import read_quantized
from trainer_svc.worker.quantized.record import Quantization

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def load_model_config(train: TrainConfig) -> PretrainedConfig:
    """Reads the model's configuration, with `rope_scaling` and `max_model_len` applied. Raises ConfigError."""
    name = train.model
    source = model_source(name)
    if is_local(source):
        _check_folder(Path(source), need_weights=not train.from_scratch)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise config_error("model", unreadable(source, error)) from error
    if train.model_type not in ("auto", config.model_type):
        raise config_error("model_type", f"is {train.model_type}, and {name} is a {config.model_type}; set it to auto")
    apply_context(config, train)
    return config


@freed_at_once()
def load_model(
    train: TrainConfig, *, source: str | Path | None = None, quantize: bool = True
) -> tuple[PreTrainedModel, Precision]:
    """Loads the base model on the device it trains on, with attention kept inside documents.

    `source` is a folder whose weights replace those of `train.model` (a checkpoint). Weights have the format of frozen
    ones (see Precision); those to be trained are widened later. With `quantize` linear layers are stored as `qlora_*`
    say, each quantised as it is read. Raises ConfigError naming the key that is wrong.
    """
    config = load_model_config(train)
    trained = torch.bfloat16 if train.master_dtype == "bf16" else torch.float32
    precision = Precision.of(
        train.torch_dtype, getattr(config, "dtype", None), trained, has_bfloat16=has_bfloat16(device(train))
    )
    if source is not None and stored_in(config) is not None:
        del config.quantization_config  # a checkpoint has plain weights
    if precision.autocast is None and trained == torch.bfloat16:
        raise config_error("master_dtype", "is bf16, and the model computes in float32; set torch_dtype: bfloat16")
    path = str(source or model_source(train.model))
    dtype = precision.frozen if train.lora else precision.trained
    try:
        if train.from_scratch and source is None:
            torch.manual_seed(train.train_seed)
            with device(train):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
        else:
            quantization = quantization_of(train, config, dtype) if quantize else None
            model = _read_weights(path, config, dtype, quantization, device(train))
    except ConfigError:
        raise
    except Exception as error:
        raise config_error("model", unreadable(path, error)) from error
    use_packed_attention(model)
    model = model.to(device(train))
    check_apart(model, precision)
    use_few_passes(model)
    return model, precision


def device(train: TrainConfig) -> torch.device:
    """Where the model trains: this process's CUDA device, or the CPU where there is none or `cpu_training` says so."""
    if train.cpu_training or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def vocab_size(model: PreTrainedModel) -> int:
    """Rows of the embedding: token ids are below it."""
    return int(model.get_input_embeddings().weight.shape[0])


def quantization_of(train: TrainConfig, config: PretrainedConfig, dtype: torch.dtype) -> Quantization | None:
    """How linear layers are to be stored; None for as they are. Raises ConfigError if they are quantised already."""
    quantization = Quantization.of(train, dtype, int(getattr(config.get_text_config(), "num_hidden_layers", 0)))
    kind = stored_in(config)
    if quantization is not None and kind is not None:
        raise config_error(
            "model", f"{train.model} is quantised already ({kind}); leave out qlora_*, or name its original"
        )
    return quantization


def stored_in(config: PretrainedConfig) -> str | None:
    """The format of a checkpoint that is quantised; None for plain weights."""
    theirs = getattr(config, "quantization_config", None)
    if theirs is None:
        return None
    return str(theirs.get("quant_method") if isinstance(theirs, dict) else theirs.quant_method)


def read_decoded(
    path: str, config: PretrainedConfig, dtype: torch.dtype | Literal["auto"]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and transformers' report of the loading. MXFP4, which gpt-oss comes in, is decoded so that it trains.

    `auto` is the checkpoint's dtype.
    """
    mxfp4 = stored_in(config) == "mxfp4"
    options = {"quantization_config": Mxfp4Config(dequantize=True)} if mxfp4 else {}
    model, report = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
    )
    if mxfp4:
        model._weight_conversions = None  # else plain weights would be written by the names of MXFP4's parts
        model = model.to(model.dtype if dtype == "auto" else dtype)
    return model, report


def _read_weights(
    path: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    quantization: Quantization | None,
    where: torch.device,
) -> PreTrainedModel:
    """Reads all weights; one that the files lack is an error, not a random one."""
    if quantization is None:
        model, report = read_decoded(path, config, dtype)
    else:
        model, report = read_quantized(path, config, quantization, where)
    missing = sorted(report["missing_keys"])
    if missing:
        raise config_error("model", f"{path} lacks weights that its config.json calls for: {', '.join(missing[:5])}")
    return model


def require_folder(path: Path) -> None:
    """Raises ConfigError unless a model's folder is there."""
    if not path.is_dir():
        raise config_error(
            "model", f"there is no folder {path}; give a model's folder or its name on the Hugging Face hub"
        )


def _check_folder(path: Path, *, need_weights: bool) -> None:
    require_folder(path)
    if not (path / "config.json").is_file():
        hint = "; it is an adapter: set adapter_path to it and model to its base" if _is_adapter(path) else ""
        raise config_error("model", f"{path} has no config.json, so it is not a model's folder{hint}")
    if need_weights and not any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise config_error(
            "model",
            f"{path} has no weights ({' or '.join(WEIGHT_FILES)}); set from_scratch: true to start from random ones",
        )


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def unreadable(name: str, error: Exception) -> str:
    """Why a model or its tokenizer could not be loaded: the file that is damaged, or else what the library says."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "ignore_mismatched_sizes" in first:
        first = "the weights have other shapes than config.json says; one of the two is of another model"
    elif "custom code" in first:
        first = "it needs code of its own (auto_map), which is not run here; choose a model that transformers knows"
    elif isinstance(error, UnpicklingError):
        first = "a .bin file has more in it than weights, which could run code; get the model as safetensors"
    elif is_local(name):
        first = damage(Path(name)) or first
    where = "the folder" if is_local(name) else "the Hugging Face hub (is it spelt right, and is the hub reachable?)"
    return f"could not load {name} from {where}: {first}"
