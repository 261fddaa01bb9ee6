"""Optimisers on weights that are cut over ranks: the steps and the state of one process."""

from __future__ import annotations

import os
import subprocess
import sys

from trainer_svc.rank_plan import RankPlan


def test_three_ranks_step_as_one_does() -> None:
    """Moments of 8 bits and what they move bit-identical, the rest to 1e-5: shares_program.py compares."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.trainer.shares_program"],
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        for environment in RankPlan(3).environments()
    ]
    try:
        assert [rank.wait(timeout=200) for rank in ranks] == [0, 0, 0]
    finally:
        for rank in ranks:
            rank.kill()
