"""Names of models and datasets: a path on this machine, a URL of an object store, or a name on
the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from surogate.storage.fetch import local
from surogate.urls import is_url


def is_local(name: str) -> bool:
    """Whether a model or dataset name means a path on this machine rather than a name on the Hugging Face hub."""
    return not is_url(name) and (Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1)


def model_source(model: str) -> str:
    """What transformers is to load: an expanded path, a name on the hub, or the path of what a URL names."""
    return str(Path(model).expanduser()) if is_local(model) else local(model, "train.model")
