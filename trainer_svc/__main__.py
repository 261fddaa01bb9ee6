"""`python -m trainer_svc`: the trainer's front."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from surogate.service import main as run
from trainer_svc.settings import TrainerSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM; returns the exit code."""
    return run(TrainerSettings, "trainer_svc.service:lifespan", argv, prog="surogate-trainer")


if __name__ == "__main__":
    sys.exit(main())
