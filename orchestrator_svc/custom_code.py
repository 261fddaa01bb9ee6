"""Functions of the user's that run in the orchestrator: only from modules that its settings name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from surogate.errors import ConfigError, Violation

ANY = "*"
"""In `custom_modules`: every module. For an orchestrator that serves one user alone."""


def check_allowed(import_path: str, allowed: Sequence[str], key: str) -> None:
    """Refuses a module that the settings do not name.

    Raises:
        ConfigError: Naming `key`.
    """
    module = _split(import_path)[0]
    if ANY in allowed or any(module == name or module.startswith(f"{name}.") for name in allowed):
        return
    raise ConfigError.of(
        [Violation(key, f"this orchestrator runs no functions of {module}: allow it by its setting custom_modules")]
    )


def load_function(import_path: str, key: str) -> Callable[..., Any]:
    """The function that `module:name` names.

    Raises:
        ConfigError: Naming `key`, when the module cannot be imported or has no such function.
    """
    module_name, name = _split(import_path)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError.of([Violation(key, f"cannot import {module_name}: {error}")]) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError.of([Violation(key, f"{module_name} has no function {name}")])
    return function  # type: ignore[no-any-return]


def _split(import_path: str) -> tuple[str, str]:
    module, _, name = re.sub(":", ".", import_path).rpartition(".")
    return module, name
