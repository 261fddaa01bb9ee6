"""The error that names a key of train.yaml."""

from __future__ import annotations

from surogate.errors import ConfigError, Violation


def config_error(key: str, description: str) -> ConfigError:
    """An error that names one key of train.yaml."""
    return ConfigError.of([Violation(f"train.{key}", description)])
