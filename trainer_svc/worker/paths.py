"""Names of models and datasets: a path on this machine, or a name on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path


def is_local(name: str) -> bool:
    """Whether a model or dataset name means a path on this machine rather than a name on the Hugging Face hub."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
