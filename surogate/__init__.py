"""Surogate: pretraining, fine-tuning and GRPO of language models as four gRPC services.

`Client` launches and follows jobs; see `surogate.client`. Importing this package loads neither gRPC nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surogate.client import AsyncClient, Client, ClientSecurity, job_config

__all__ = ["AsyncClient", "Client", "ClientSecurity", "job_config"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("surogate.client"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
