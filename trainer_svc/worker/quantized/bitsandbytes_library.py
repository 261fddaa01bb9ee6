"""bitsandbytes, loaded when something needs it."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from surogate.errors import ConfigError, Violation


def load_bitsandbytes(key: str) -> Any:
    """The library. Raises ConfigError, naming the key that needs it, where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it warns of kernels that are not needed here
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        problem = Violation(f"train.{key}", f"needs bitsandbytes, which is not installed ({error})")
        raise ConfigError.of([problem]) from error
