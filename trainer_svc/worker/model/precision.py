"""Which number formats weights and arithmetic have."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """Formats of one session.

    `stored`: what files and pushed weights have. `frozen`: weights that are not trained. `autocast`: what matrix
    products are computed in, None for float32 throughout. `trained`: weights that are, in memory.
    """

    stored: torch.dtype
    frozen: torch.dtype
    autocast: torch.dtype | None
    trained: torch.dtype = torch.float32

    @classmethod
    def of(
        cls,
        torch_dtype: str,
        checkpoint_dtype: torch.dtype | None,
        trained: torch.dtype = torch.float32,
        *,
        has_bfloat16: bool = True,
    ) -> Precision:
        """`torch_dtype` of the configuration; `auto` takes the checkpoint's, or float32 where it names none.

        float16 is stored as such but computed in float32: its narrow range would need loss scaling. So is bfloat16
        where the device lacks it, unless weights are trained in it.
        """
        stored = _DTYPES[torch_dtype] if torch_dtype != "auto" else (checkpoint_dtype or torch.float32)
        if stored == torch.bfloat16 and (has_bfloat16 or trained == torch.bfloat16):
            return cls(stored, torch.bfloat16, torch.bfloat16, trained)
        return cls(stored, torch.float32, None, trained)

    def computing(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """The context in which the model is called."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


def has_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are no slower than those of float32: by CPUs without them they take many times as
    long.
    """
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
