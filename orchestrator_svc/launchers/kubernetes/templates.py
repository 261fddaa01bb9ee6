"""Pod templates: files of the operator's that say how the pods of each component look."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from orchestrator_svc.launchers.base import Component
from orchestrator_svc.launchers.kubernetes.api import Object
from surogate.errors import ConfigError, Violation


class Templates:
    """The folder of `trainer.yaml`, `inference.yaml` and `reward.yaml`. Read anew for each pod: a mounted ConfigMap
    changes under a running orchestrator."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, component: Component) -> Object:
        """`{metadata, spec}` of a component's pods. Raises ConfigError naming the file."""
        file = self._folder / f"{component}.yaml"
        try:
            data = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise _wrong(file, f"cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise _wrong(file, f"is not YAML: {' '.join(str(error).split())}") from error
        return _checked(file, data)


def _checked(file: Path, data: Any) -> Object:
    if isinstance(data, dict) and data.get("kind") == "PodTemplate":
        data = data.get("template")
    if not isinstance(data, dict) or not isinstance(data.get("spec"), dict):
        raise _wrong(file, "must be a Pod: a mapping with spec, and perhaps metadata")
    containers = data["spec"].get("containers")
    if not isinstance(containers, list) or not containers or not all(isinstance(one, dict) for one in containers):
        raise _wrong(file, "must have spec.containers; the first is the worker")
    metadata = data.get("metadata") or {}
    kept = {key: metadata[key] for key in ("labels", "annotations") if metadata.get(key)}
    return {"metadata": deepcopy(kept), "spec": deepcopy(data["spec"])}


def _wrong(file: Path, what: str) -> ConfigError:
    return ConfigError.of([Violation("pod_templates", f"{file} {what}")])
