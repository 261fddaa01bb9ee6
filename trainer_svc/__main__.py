"""`python -m trainer_svc`: the trainer's front."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from surogate.service import main as run
from trainer_svc.rank_plan import is_further_node
from trainer_svc.settings import TrainerSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM; returns the exit code."""
    if is_further_node():
        from trainer_svc.node import serve

        return serve(argv)
    return run(TrainerSettings, "trainer_svc.service:lifespan", argv, prog="surogate-trainer")


if __name__ == "__main__":
    sys.exit(main())
