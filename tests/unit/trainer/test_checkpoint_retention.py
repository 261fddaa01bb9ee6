"""Which checkpoints are kept when another one was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer_svc.worker.folders.checkpoint_folders import checkpoints, forget_old


@pytest.mark.parametrize(
    ("limit", "keep_interval", "kept"),
    [(2, 0, [50, 40]), (2, 20, [50, 40, 20]), (1, 30, [50, 30]), (9, 0, [50, 40, 30, 20, 10])],
)
def test_the_newest_stay_and_multiples_of_the_interval(
    tmp_path: Path, limit: int, keep_interval: int, kept: list[int]
) -> None:
    for step in (10, 20, 30, 40, 50, 60):  # 60: of a run that was abandoned
        (tmp_path / f"checkpoint-{step}").mkdir()
    forget_old(tmp_path, limit, step=50, keep_interval=keep_interval)
    assert [step for step, _ in checkpoints(tmp_path)] == kept
