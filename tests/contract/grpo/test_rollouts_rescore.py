"""`surogate rollouts rescore` against the real reward service, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from surogate.rollouts import write_step
from tests.unit.grpo.test_rollout_store import row


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Two right answers that were given 1 and 0.2, and one that is wrong."""
    answers = [("cba", 1.0), ("cba", 0.2), ("", 0.0)]
    rows = [row(1, i, completion=text, reward=reward) for i, (text, reward) in enumerate(answers)]
    write_step(tmp_path, 1, rows)
    return tmp_path


def rescore(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "surogate.cli.main", "rollouts", "rescore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def test_the_built_in_service_scores_again_and_says_how_far_it_agrees(stored: Path, tmp_path: Path) -> None:
    done = rescore(stored, "--with", "reverse-text", "--json", "--output", tmp_path / "again.parquet")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["rollouts"], found["scored"], found["failed"]) == (3, 3, 0)
    assert found["agreement"] == pytest.approx(2 / 3)
    assert found["mean_now"] == pytest.approx(2 / 3)
    assert sorted(pq.read_table(tmp_path / "again.parquet")["new_reward"].to_pylist()) == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--with", "no-such"), "no-such"),
        (("--with", "reverse-text", "--address", "127.0.0.1:1"), "cannot reach the reward service"),
        (("--with", "reverse-text", "--set", "max_wrds=3"), "max_wrds"),
    ],
)
def test_what_cannot_be_is_said_without_a_traceback(stored: Path, arguments: tuple[str, ...], said: str) -> None:
    done = rescore(stored, *arguments)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
