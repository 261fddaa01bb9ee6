"""What a model directory holds, read from its config and the headers of its weights: nothing is loaded.

The same headers later say which tensors a weight update may bring.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surogate.errors import ConfigError, Violation
from surogate.urls import is_url

_HEADER_LIMIT = 100 << 20
OUTPUT_HEAD = "lm_head.weight"
_EXPERTS = ".experts."
_NOT_ADAPTED = {"embed_tokens", "lm_head", "gate", "router", "shared_expert_gate"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint."""

    dtype: str
    """By the names of the safetensors format: F32, BF16, …"""
    shape: tuple[int, ...]
    file: Path


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint on disk: its config.json and its tensors by name."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding, so that a checkpoint may leave it out."""
        return bool(self.text_config.get("tie_word_embeddings", self.config.get("tie_word_embeddings", False)))

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return any(_EXPERTS in name for name in self.tensors)

    @property
    def linear_names(self) -> list[str]:
        """Last parts of the names of linear layers that may have adapters: no experts, routers or embeddings."""
        layers = {
            name.removesuffix(".weight").rpartition(".")[2]
            for name, info in self.tensors.items()
            if name.endswith(".weight") and len(info.shape) == 2 and _EXPERTS not in name
        }
        return sorted(layers - _NOT_ADAPTED)

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config, which models of several modalities nest."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config


def is_local(model: str) -> bool:
    """Whether `model` means a directory rather than a hub name or a URL."""
    return not is_url(model) and (Path(model).exists() or model.startswith(("/", ".", "~")) or model.count("/") != 1)


def read_model(directory: Path) -> ModelFiles:
    """Reads config.json and the headers of *.safetensors. Raises ConfigError that names `model` and what is missing."""
    if not directory.is_dir():
        raise _wrong(f"{directory} is not a directory")
    config_file = directory / "config.json"
    if not config_file.is_file():
        if (directory / "adapter_config.json").is_file():
            raise _wrong(f"{directory} holds an adapter, not a model; merge it into its base first (surogate merge)")
        raise _wrong(f"{directory} has no config.json")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _wrong(f"{config_file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise _wrong(f"{config_file} holds no JSON object")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise _wrong(f"{directory} has no weights (*.safetensors)")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors.update(read_header(file))
    _check_index(directory, tensors)
    return ModelFiles(directory, config, tensors)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors in a safetensors file. Raises ConfigError if it is not one."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((item["data_offsets"][1] for item in header.values()), default=0)
        if file.stat().st_size < end:
            raise ValueError(f"it ends after {file.stat().st_size} of {end} bytes")
        return {name: TensorInfo(item["dtype"], tuple(item["shape"]), file) for name, item in header.items()}
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise _wrong(f"{file} is not a whole safetensors file: {error}") from error


def _check_index(directory: Path, tensors: dict[str, TensorInfo]) -> None:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _wrong(f"{index} cannot be read: {error}") from error
    missing = sorted({file for name, file in names.items() if name not in tensors})
    if missing:
        raise _wrong(f"{directory} lacks weights that its index names: {', '.join(missing[:3])}")


def _wrong(description: str) -> ConfigError:
    return ConfigError.of([Violation("model", description)])
