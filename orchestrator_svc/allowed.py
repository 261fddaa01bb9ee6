"""What a job may name on a server that several people share: files to read, variables to send, code to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from orchestrator_svc.custom_code import ANY
from surogate.config.paths import input_paths
from surogate.errors import ConfigError, Violation

_TOKEN_ENV = "token_env"  # noqa: S105 - a key's name


def check_inputs(config: Mapping[str, Any], roots: Sequence[Path]) -> None:
    """Refuses paths to read that lead out of all `roots`, through links too; names on a hub and URLs pass.

    Raises:
        ConfigError: Naming the keys.
    """
    inside = [root.expanduser().resolve() for root in roots]
    violations = [
        Violation(key, f"{value!r} is outside of the folders that this server lets jobs read")
        for key, value in input_paths(config)
        if not any(Path(value).expanduser().resolve().is_relative_to(root) for root in inside)
    ]
    if violations:
        raise ConfigError.of(violations)


def check_variables(config: Mapping[str, Any], patterns: Sequence[str]) -> None:
    """Refuses a `token_env`, wherever in a job, that `patterns` do not name: its value would be sent to an address that
    the job names too.

    Raises:
        ConfigError: Naming the keys.
    """
    violations = [
        Violation(key, f"this server sends no variable of the name {name!r} to others: see token_variables")
        for key, name in _named(config, _TOKEN_ENV)
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if violations:
        raise ConfigError.of(violations)


def check_remote_code(config: Mapping[str, Any], custom_modules: Sequence[str]) -> None:
    """Refuses `trust_remote_code`, which runs code that comes with a model, unless jobs may run any code.

    Raises:
        ConfigError: Naming the key.
    """
    if any(value is True for _, value in _found(config, "trust_remote_code")) and ANY not in custom_modules:
        why = "this server runs no code that comes with a model: it would need custom_modules: ['*']"
        raise ConfigError.of([Violation("infer.trust_remote_code", why)])


def _named(config: Any, name: str) -> Iterator[tuple[str, str]]:
    return ((key, value) for key, value in _found(config, name) if isinstance(value, str) and value)


def _found(value: Any, name: str, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a key of that name, with the whole key."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for part, inner in items:
        whole = f"{key}.{part}" if key else str(part)
        if part == name:
            yield whole, inner
        yield from _found(inner, name, whole)
