"""Ways of giving workers to jobs."""

from __future__ import annotations

from orchestrator_svc.launchers.base import Launcher
from orchestrator_svc.launchers.local import LocalLauncher
from orchestrator_svc.launchers.static import StaticLauncher
from orchestrator_svc.settings import OrchestratorSettings


def make_launcher(settings: OrchestratorSettings) -> Launcher:
    """The launcher that the settings name."""
    if settings.launcher == "kubernetes":
        from orchestrator_svc.launchers.kubernetes.launcher import KubernetesLauncher

        return KubernetesLauncher(settings)
    return {"local": LocalLauncher, "static": StaticLauncher}[settings.launcher](settings)
