"""The services of examples/custom_reward in a real GRPO job: one in Python, one in TypeScript."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator_svc.jobs.metrics_file import read_metrics
from surogate.reward.conformance import Verdict, Wishes, check_service
from surogate.rollouts import read_steps
from surogate.rpc.channel import ClientSecurity
from tests.helpers.grpo.grpo_files import write_grpo_files
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.reward import custom_rewards as custom
from tests.helpers.shell import Shell, steps_shown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TypeScript service, built."""
    return custom.build_typescript(tmp_path_factory.mktemp("typescript"))


async def test_the_typescript_service_keeps_to_the_contract(program: Path) -> None:
    with custom.typescript(program) as address:
        report = await check_service(address, Wishes("vowels"), ClientSecurity())
    assert not [finding for finding in report.findings if finding.verdict in (Verdict.FAIL, Verdict.ADVICE)]


async def test_a_job_trains_on_both(program: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", std=0.1)
    prompts = {"dataset": str(custom.EXAMPLES / "prompts.jsonl")}
    shell = Shell(tmp_path)
    with custom.sdk() as python, custom.typescript(program, REWARD_TOKEN="secret") as typescript:
        env = [
            {"id": "vowels", "name": "python", "address": python, "args": prompts},
            {"id": "vowels", "name": "typescript", "address": typescript, "args": prompts, "token_env": "VOWEL_TOKEN"},
        ]
        files = write_grpo_files(tmp_path, train={"max_steps": 2}, orch={"env": env, "buffer": {"env_ratios": [1, 1]}})
        code, out, err = shell.run(*files, VOWEL_TOKEN="secret")
    assert code == 0, err + out
    assert steps_shown(out) == [1, 2]
    stored = [row for _, rows in read_steps(tmp_path / "out") for row in rows]
    assert {row["environment"] for row in stored} == {"python", "typescript"}
    assert all(0 <= row["reward"] <= 1 for row in stored)
    assert len({row["reward"] for row in stored}) > 2
    names = {name for line in read_metrics(tmp_path / "out" / "metrics.jsonl") for name in line}
    assert {"env/python/reward/mean", "env/typescript/reward/mean"} <= names
