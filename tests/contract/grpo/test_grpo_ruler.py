"""The judge in the loop (`ruler`): what its scores do to rewards, and what happens when it gives none."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator_svc.grpo.configured.settings import EnvironmentSpec, RulerSpec
from orchestrator_svc.grpo.fatal import JudgeFailedError
from surogate.errors import InternalError
from surogate.rollouts import read_steps
from surogate.rpc.status import to_status
from surogate.v1 import reward_pb2
from tests.helpers.grpo.grpo_fakes import Fakes, scores
from tests.helpers.grpo.grpo_job import GrpoJob, grpo_job

JUDGE = EnvironmentSpec("ruler", "judge", "orch.ruler", timeout=30.0, args={"relative": True}, train=False)


def judging(job: GrpoJob, fakes: Fakes, mode: Any, *, fails: bool = False, swallow: bool = True) -> None:
    """Has groups judged: rollout i of a group gets i / 10; the group of ordinal 1 gets none where the judge fails."""
    job.settings = replace(job.settings, ruler=RulerSpec(mode, 2.0, 4, swallow, JUDGE))

    async def hook(request: reward_pb2.ScoreRolloutsRequest) -> reward_pb2.ScoreRolloutsResponse | None:
        if request.environment != "judge":
            return None
        response = scores(request)
        for index, result in enumerate(response.results):
            result.score.CopyFrom(reward_pb2.Score(reward=index / 10, components={"cost": 0.5}))
            if fails and request.group_id == f"{1:09d}":
                result.error.CopyFrom(to_status(InternalError("the judge is ill")))
        return response

    fakes.hooks.on["ScoreRollouts"] = hook


def rows(job: GrpoJob) -> list[dict[str, Any]]:
    return [row for _, found in read_steps(job.folder) for row in found]


@pytest.mark.parametrize("mode", ["replace", "add", "metric"])
async def test_scores_of_the_judge_in_each_mode(tmp_path: Path, mode: str) -> None:
    async with grpo_job(tmp_path, max_steps=1) as (job, fakes):
        judging(job, fakes, mode)
        await job.run()
        for row in rows(job):
            parts, score = row["components"], int(row["rollout_id"][-4:]) / 10
            assert (parts["judge"], parts["judge.cost"]) == (score, 0.5)
            own = parts["environment"] if mode != "metric" else row["reward"]
            expected = {"replace": 2 * score, "add": own + 2 * score, "metric": own}[mode]
            assert row["reward"] == pytest.approx(expected)
            assert parts["exact"] == 0
        line = json.loads((job.folder / "metrics.jsonl").read_text().splitlines()[0])
        assert line["reward/judge"] == pytest.approx(0.15)
        assert line["reward/judge.cost"] == 0.5


@pytest.mark.parametrize(("mode", "ends"), [("replace", {"trained": 2, "judge": 1}), ("add", {"trained": 2})])
async def test_a_judge_that_fails_gives_no_reward_of_0(tmp_path: Path, mode: str, ends: dict[str, int]) -> None:
    async with grpo_job(tmp_path, max_steps=1, refill_rounds=1) as (job, fakes):
        judging(job, fakes, mode, fails=True)
        await job.run()
        assert Counter(row.cause or row.state for row in await job.draws()) == ends
        group = [row for row in rows(job) if row["group_id"] == f"{1:09d}"]
        assert [("judge" in row["components"]) for row in group] == ([] if mode == "replace" else [False] * 4)
        notices = [event.notice.text for event in await job.events() if event.HasField("notice")]
        assert any("the judge is ill" in text for text in notices)


async def test_a_judge_that_fails_may_end_the_job(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=1) as (job, fakes):
        judging(job, fakes, "add", fails=True, swallow=False)
        with pytest.raises(JudgeFailedError, match=r"orch\.ruler: .*the judge is ill"):
            await job.run()
