"""`python -m reward_svc`: the reward service."""

from __future__ import annotations

import sys

from reward_svc.settings import BuiltInSettings
from surogate.service import main as service_main


def main() -> int:
    """Serves until SIGTERM; returns the exit code."""
    return service_main(BuiltInSettings, "reward_svc.lifespan:lifespan", prog="surogate-reward")


if __name__ == "__main__":
    sys.exit(main())
