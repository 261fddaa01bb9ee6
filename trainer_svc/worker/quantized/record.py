"""How a base was quantised: noted on the model, and written beside its adapter, which fits that base alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from surogate.config.train import TrainConfig
from trainer_svc.worker.quantized.storage import Fp8, Nf4, Nvfp4, Storage, storage_of

FILE = "base_quantization.json"
"""The record's name in an adapter's folder."""

_STORAGES: dict[str, type[Any]] = {kind.name: kind for kind in (Nf4, Fp8, Nvfp4)}
_ATTRIBUTE = "base_quantization"


@dataclass(frozen=True)
class Quantization:
    """The format, the dtype that weights had before they were quantised (and have where they were not), and layers that
    were left out.
    """

    storage: Storage
    dtype: torch.dtype
    skip: tuple[str, ...] = ()

    @classmethod
    def of(cls, train: TrainConfig, dtype: torch.dtype, num_layers: int) -> Quantization | None:
        """What a configuration asks for; None for weights as they are."""
        storage = storage_of(train)
        if storage is None:
            return None
        return cls(storage, dtype, skipped_layers(train, num_layers))

    @classmethod
    def noted(cls, model: torch.nn.Module) -> Quantization | None:
        """How the model was quantised; None if it was not."""
        return cast("Quantization | None", getattr(model, _ATTRIBUTE, None))

    def note(self, model: torch.nn.Module) -> None:
        """Remembers it with the model."""
        setattr(model, _ATTRIBUTE, self)

    def write(self, folder: Path) -> None:
        """Writes the record into an adapter's folder."""
        values = {
            "storage": self.storage.name,
            **asdict(cast(Any, self.storage)),
            "dtype": str(self.dtype).removeprefix("torch."),
            "skip": list(self.skip),
        }
        (folder / FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Quantization | None:
        """The record in a folder; None if there is none. Raises ValueError for one that is no such record."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            storage = _STORAGES[values.pop("storage")]
            dtype, skip = getattr(torch, values.pop("dtype")), tuple(values.pop("skip"))
            return cls(storage(**values), dtype, skip)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not say how the base was quantised: {error}") from error


def skipped_layers(train: TrainConfig, num_layers: int) -> tuple[str, ...]:
    """Parts of names, as `layers.0`, of the decoder layers that `skip_quant_*` leaves as they are."""
    first = range(min(train.skip_quant_first_layers, num_layers))
    last = range(max(num_layers - train.skip_quant_last_layers, 0), num_layers)
    return tuple(f"layers.{layer}" for layer in sorted({*first, *last}))
