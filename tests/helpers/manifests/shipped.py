"""The manifests that the repository ships, rendered."""

from __future__ import annotations

import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path

from tests.helpers.manifests.objects import Cluster, load, render

ROOT = Path(__file__).parents[3]
KUSTOMIZATIONS = ("base", "overlays/cpu-kind", "overlays/gpu", "overlays/gpu-multinode")
NO_KUBECTL = "" if shutil.which("kubectl") else "needs kubectl, which renders kustomizations"

GIVEN = frozenset(f"Secret/{name}" for name in ("surogate-client-tokens", "surogate-postgres", "surogate-s3"))
"""Secrets that k8s/README.md has people make."""


@cache
def text(name: str) -> str:
    """A kustomization as it is applied."""
    return render(ROOT / "k8s" / name)


def cluster(name: str) -> Cluster:
    """Its objects, to look at and to break."""
    return deepcopy(_loaded(name))


@cache
def _loaded(name: str) -> Cluster:
    return load(text(name), GIVEN)
