"""`python -m orchestrator_svc`: the orchestrator as a process."""

from __future__ import annotations

import sys

from orchestrator_svc.settings import OrchestratorSettings
from surogate import service


def main() -> int:
    """Serves until SIGTERM; returns the exit code."""
    return service.main(OrchestratorSettings, "orchestrator_svc.lifespan:lifespan", prog="surogate-orchestrator")


if __name__ == "__main__":
    sys.exit(main())
