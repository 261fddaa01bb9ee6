"""The base under an adapter, written as a model of its own where it is not the one that the configuration names."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surogate.errors import DataLossError
from surogate.storage.whole import new_folder
from trainer_svc.worker.adapters import lora
from trainer_svc.worker.folders.files import write_model
from trainer_svc.worker.model.precision import Precision
from trainer_svc.worker.quantized.record import Quantization


def save_base(model: PreTrainedModel, precision: Precision, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the weights under the adapter's layers; of quantised ones what they mean, with the record of how.

    Raises DataLossError if the disk refuses.
    """
    quantization = Quantization.noted(model)
    try:
        with new_folder(folder) as temporary:
            write_model(model, lora.base_state(model, precision.stored), precision.stored, temporary)
            tokenizer.save_pretrained(temporary)
            if quantization is not None:
                quantization.write(temporary)
    except OSError as error:
        raise DataLossError(f"could not write {folder}: {error}", reason="MODEL_NOT_WRITTEN") from error
