"""Where a job may write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surogate.errors import ConfigError, Violation

_WRITING_KEYS = ("train.output_dir", "train.checkpoint_dir", "train.log_file", "orch.output_dir")


def output_dir_of(config: Mapping[str, Any], resolved: Any, root: Path | None, job_id: str) -> Path:
    """The absolute folder of a job.

    `orch.output_dir` if the GRPO file sets it, else `train.output_dir`. Unset, it is the key's default under the
    current folder, or ROOT/JOB_ID where there is an output root.
    """
    given = _get(config, "orch.output_dir") or _get(config, "train.output_dir")
    if given:
        folder = Path(str(given)).expanduser()
    elif root is not None:
        folder = Path(job_id)
    else:
        folder = Path(resolved.orch.output_dir if resolved.kind == "grpo" else resolved.train.output_dir)
    return ((root or Path()) / folder).resolve()


def check_paths(config: Mapping[str, Any], root: Path) -> None:
    """Refuses keys that would have the job write outside of `root`.

    Raises:
        ConfigError: Naming the keys.
    """
    inside = root.resolve()
    violations = [
        Violation(key, f"{value!r} is outside of this server's output root: give a relative path without `..`")
        for key in _WRITING_KEYS
        if (value := _get(config, key)) is not None and not (inside / Path(str(value))).resolve().is_relative_to(inside)
    ]
    if violations:
        raise ConfigError.of(violations)


def _get(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
