"""The GRPO loop against fakes on real gRPC servers: what is drawn, trained, pushed and written down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator_svc.grpo.configured.advantage import Floats
from orchestrator_svc.grpo.configured.difficulty import Difficulty
from orchestrator_svc.grpo.configured.filters import Filter
from orchestrator_svc.grpo.groups import Rollout
from orchestrator_svc.jobs.context import WRITING_MODEL
from surogate.rollouts import read_steps
from tests.helpers.grpo.grpo_job import grpo_job, run_killed_at


@pytest.mark.parametrize("level", [0, 1, 2])
async def test_every_step_trains_on_a_full_batch_and_is_pushed(tmp_path: Path, level: int) -> None:
    async with grpo_job(tmp_path, replicas=2, max_async_level=level) as (job, fakes):
        await job.run()

        assert [step for step, _ in fakes.trainer.history] == [1, 2, 3, 4]
        assert [replica.version for replica in fakes.inference] == [4, 4]
        assert {replica.weights for replica in fakes.inference} == {fakes.trainer.history[-1][1]}
        draws = await job.draws()
        assert [row.ordinal for row in draws] == list(range(8))
        assert all(row.state == "trained" for row in draws)
        assert all(len(prompts) == 2 for _, prompts in await job.rows())
        lags = [row.step - 1 - (row.oldest_version or 0) for row in draws]
        assert min(lags) >= 0
        assert max(lags) <= level


async def test_on_policy_rollouts_come_from_the_policy_of_the_step_before(tmp_path: Path) -> None:
    async with grpo_job(tmp_path) as (job, _):
        await job.run()
        assert [row.oldest_version for row in await job.draws()] == [0, 0, 1, 1, 2, 2, 3, 3]


async def test_reports_steps_pushes_evaluations_and_the_final_model(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, evaluate=2, checkpoint_interval=3) as (job, _):
        await job.run()
        events = await job.events()

        steps = [event.step_completed for event in events if event.HasField("step_completed")]
        assert [step.step for step in steps] == [1, 2, 3, 4]
        assert {"reward/mean", "reward/exact", "time/generate", "time/train", "policy/lag", "loss"} <= set(
            steps[0].metrics
        )
        assert steps[0].metrics["canary/max_abs_diff"] == 0
        pushed = [event.weights_pushed.policy_version for event in events if event.HasField("weights_pushed")]
        assert pushed == [1, 2, 3, 4]
        evaluated = [event.evaluation_completed.step for event in events if event.HasField("evaluation_completed")]
        assert evaluated == [0, 2, 4]
        said = [event.state_changed.status_message for event in events if event.HasField("state_changed")]
        evaluations = [text for step in (0, 2, 4) for text in (f"evaluating step {step} on fake", "training")]
        assert said[said.index("training") :] == ["training", *evaluations, WRITING_MODEL]
        saved = [event.checkpoint_saved for event in events if event.HasField("checkpoint_saved")]
        assert [(item.step, item.final) for item in saved] == [(3, False), (4, True)]
        shown = [event.samples_shown for event in events if event.HasField("samples_shown")]
        assert [s.prompt for s in shown[0].samples] == [s.prompt for s in shown[-1].samples]

        lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert (job.folder / "plots" / "reward.png").stat().st_size > 1000
        stored = dict(read_steps(job.folder))
        assert [len(rows) for rows in stored.values()] == [8] * 4
        assert {row["fate"] for rows in stored.values() for row in rows} == {"trained"}
        assert stored[2][0]["oldest_version"] == 1
        assert [state for _, state, _ in await job.step_states()] == ["pushed"] * 4
        assert not any(kept for _, _, kept in await job.step_states())


async def test_rollouts_in_the_making_can_be_given_up_for_an_evaluation(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, evaluate=1, max_async_level=1, restart_on_evaluation=True) as (job, _):
        await job.run()
        draws = await job.draws()
        assert [(row.ordinal, row.state) for row in draws] == [(ordinal, "trained") for ordinal in range(8)]
        assert all(len(prompts) == 2 for _, prompts in await job.rows())


@pytest.mark.parametrize(("evaluate_origin", "evaluated"), [(False, [4]), (True, [2, 4])])
async def test_a_checkpoint_that_a_job_goes_on_from_is_evaluated_if_asked_for(
    tmp_path: Path, evaluate_origin: bool, evaluated: list[int]
) -> None:
    async with grpo_job(tmp_path, evaluate=2, evaluate_origin=evaluate_origin) as (job, fakes):
        fakes.trainer.disk.checkpoints["checkpoint-2"] = (2, 99)
        job.settings = replace(job.settings, resume=True)
        await job.run()
        events = await job.events()
        found = [event.evaluation_completed.step for event in events if event.HasField("evaluation_completed")]
        assert found == evaluated


async def test_prompts_that_became_easy_are_laid_aside_also_after_a_restart(tmp_path: Path) -> None:
    rules = Difficulty(easy_threshold=0.0)  # whatever was answered is easy
    async with grpo_job(tmp_path, difficulty=rules, checkpoint_interval=2) as (job, fakes):
        assert await run_killed_at(job, fakes, 30)
        assert 0 < len(fakes.trainer.history) < 4
        await job.run()
        prompts = [row.prompt for row in await job.draws() if row.state == "trained"]
        assert len(set(prompts)) == len(prompts) == 8
        laid_aside = json.loads((job.folder / "buffer" / "step-4.json").read_text())
        assert len(laid_aside["easy"]) == 8


async def test_several_environments_have_shares_and_metrics_of_their_own(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, ratios={"fake": 1.0, "other": 1.0}) as (job, _):
        first = job.settings.environments[0]
        job.settings = replace(job.settings, environments=[first, replace(first, key="other")])
        await job.run()
        rows = [row.prompt.partition("/")[0] for row in await job.draws()]
        assert set(rows) == {"fake", "other"}
        lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        both = [line for line in lines if "env/other/groups" in line]
        assert both
        assert both[0]["env/other/groups"] + both[0]["env/fake/groups"] == 2
        assert 0 <= both[0]["env/fake/reward/mean"] <= 1


async def test_advantages_of_the_users_own_train_groups_without_rewards(tmp_path: Path) -> None:
    def by_length(rewards: Floats, lengths: Floats) -> Floats:
        assert not rewards.any()
        return -lengths

    async with grpo_job(tmp_path, advantage=by_length, needs_signal=False, ask_rewards=False) as (job, fakes):
        await job.run()
        assert [step for step, _ in fakes.trainer.history] == [1, 2, 3, 4]
        assert fakes.hooks.calls["ScoreRollouts"] == 0


async def test_rollouts_that_an_enforced_filter_finds_are_not_trained_on(tmp_path: Path) -> None:
    def short(rollout: Rollout, vocabulary: int) -> bool:
        return len(rollout.token_ids) < 4

    async with grpo_job(tmp_path, filters=[Filter("short", short, enforce=True)], refill_rounds=4) as (job, _):
        await job.run()
        lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        assert any(line["filter/short"] > 0 for line in lines)
        assert all(line["completion/length"] >= 4 for line in lines)
