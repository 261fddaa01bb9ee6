"""The adapter that adds nothing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


@contextmanager
def zero_adapter(module: str, outputs: int, inputs: int) -> Iterator[Path]:
    """A PEFT directory with rank-1 matrices of zeros for one linear layer; gone after the block.

    One layer is enough: vLLM adds nothing where an adapter has no matrices.
    """
    tensors = {
        f"base_model.model.{module}.lora_A.weight": np.zeros((1, inputs), np.float32),
        f"base_model.model.{module}.lora_B.weight": np.zeros((outputs, 1), np.float32),
    }
    config = {"r": 1, "lora_alpha": 1, "target_modules": [module.rpartition(".")[2]], "peft_type": "LORA"}
    with tempfile.TemporaryDirectory(prefix="surogate-adapter-") as folder:
        directory = Path(folder)
        save_file(tensors, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        yield directory
