"""Where a job may write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from surogate.config.folders import refusal
from surogate.errors import ConfigError, Violation
from surogate.urls import is_url

_WRITING_KEYS = ("train.output_dir", "train.checkpoint_dir", "train.log_file", "orch.output_dir")


def output_dir_of(config: Mapping[str, Any], resolved: Any, root: Path | None, job_id: str) -> Path:
    """The absolute folder of a job.

    `orch.output_dir` if the GRPO file sets it, else `train.output_dir`. Unset, it is the key's default under the
    current folder, or ROOT/JOB_ID where there is an output root.

    Raises:
        ConfigError: It is a folder of the system, or one where others have their files.
    """
    given = _get(config, "orch.output_dir") or _get(config, "train.output_dir")
    if given:
        folder = Path(str(given)).expanduser()
    elif root is not None:
        folder = Path(job_id)
    else:
        folder = Path(resolved.orch.output_dir if resolved.kind == "grpo" else resolved.train.output_dir)
    found = ((root or Path()) / folder).resolve()
    if reason := refusal(str(found)):
        key = "orch.output_dir" if resolved.kind == "grpo" else "train.output_dir"
        raise ConfigError.of([Violation(key, reason)])
    return found


def check_paths(config: Mapping[str, Any], root: Path) -> None:
    """Refuses keys that would have the job write outside of `root`.

    Raises:
        ConfigError: Naming the keys.
    """
    inside = root.resolve()
    violations = [
        Violation(key, f"{value!r} is outside of this server's output root: give a relative path without `..`")
        for key in _WRITING_KEYS
        if (value := _get(config, key)) is not None
        and not is_url(value)
        and not (inside / Path(str(value)).expanduser()).resolve().is_relative_to(inside)
    ]
    if violations:
        raise ConfigError.of(violations)


def check_output(folder: Path, model: str) -> None:
    """Refuses a job that would write its model over the one that it starts from.

    Raises:
        ConfigError: Naming `train.output_dir`.
    """
    if not is_url(model) and Path(model).expanduser().resolve() == folder:
        text = f"is the folder of the model ({model}), which the trained one would replace: choose another folder"
        raise ConfigError.of([Violation("train.output_dir", text)])


def check_urls(config: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuses URLs, wherever in a job, that begin with none of `allowed`, or climb out of it.

    Raises:
        ConfigError: Naming the keys.
    """
    violations = [
        Violation(key, f"{url!r} is not below a URL that this server allows ({', '.join(allowed)})")
        for key, url in _urls(config)
        if ".." in url.split("/") or not url.startswith(tuple(f"{prefix.rstrip('/')}/" for prefix in allowed))
    ]
    if violations:
        raise ConfigError.of(violations)


def _urls(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if is_url(value):
        yield key, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from _urls(inner, f"{key}.{name}" if key else str(name))


def _get(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
