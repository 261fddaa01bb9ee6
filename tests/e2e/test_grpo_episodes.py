"""`surogate grpo` on episodes of several turns, with everything real: four services and vLLM, in float32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator_svc.jobs.metrics_file import read_metrics
from reward_svc.environments.guess_number import NO_NUMBER
from surogate.rollouts import read_steps
from tests.helpers.grpo.grpo_files import write_grpo_files
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.reward.judge_server import JudgeServer, judge_server, material, scores
from tests.helpers.shell import Shell, steps_shown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = [1, 2, 3]


@pytest.fixture
def judge() -> Iterator[JudgeServer]:
    """Gives 0.5 to each."""
    with judge_server(lambda request: scores(*[0.5] * len(material(request)["answers"]))) as found:
        yield found


def test_episodes_are_trained_on_as_they_were_sampled(tmp_path: Path, judge: JudgeServer) -> None:
    shell = Shell(tmp_path)
    make_tiny_model(tmp_path / "model", std=0.1, max_position_embeddings=1024)
    orch = {
        "env": [{"id": "guess-number", "max_turns": 3, "args": {"span": 99, "max_value": 100}}],
        "sampling": {"max_tokens": 160, "temperature": 1.0},
        "refill_rounds": 4,
        "ruler": {"enabled": True, "mode": "metric", "judge_model": "m", "judge": {"base_url": judge.url}},
    }
    train = {"sequence_len": 900, "max_steps": len(STEPS), "max_async_level": 1}
    arguments = write_grpo_files(tmp_path, train=train, orch={**orch, "max_async_level": 1})
    code, out, err = shell.run(*arguments)
    assert code == 0, err + out
    assert steps_shown(out) == STEPS

    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert all(line["episode/turns"] > 1 for line in lines)
    assert all(line["reward/judge"] == 0.5 and line["reward/judge.input_tokens"] > 0 for line in lines)
    # On-policy in the first step: every token that was sampled, in whichever turn, has the trainer's own logprob.
    assert lines[0]["mismatch_kl"] < 1e-9
    assert all(line["canary/max_abs_diff"] <= 1e-5 for line in lines if "canary/max_abs_diff" in line)

    rows = [row for _, found in read_steps(tmp_path / "out") for row in found]
    several = [row for row in rows if row["turns"] > 1]
    assert any(row["step"] == 1 and row["fate"] == "trained" for row in several), "what the mismatch above is about"
    for row in several:
        assert not all(row["sampled"]) and row["sampled"][-1]
        assert all(value == 0 for value, own in zip(row["logprobs"], row["sampled"], strict=True) if not own)
        answers = [m["content"] for m in json.loads(row["messages"]) if m["role"] == "user"]
        assert set(answers) <= {NO_NUMBER, "Higher.", "Lower."} and answers
    code, out, err = shell.run("rollouts", "show", "out", several[0]["rollout_id"])
    assert code == 0, err
    assert f"in {several[0]['turns']} turns" in out
    shell.wait_until(lambda: not shell.processes())
