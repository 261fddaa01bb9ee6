"""Files of a GRPO job: the completions that evaluations show."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator_svc.grpo.reporting.output import write_samples
from surogate.v1 import job_pb2


def sample(environment: str, completion: str) -> job_pb2.Sample:
    return job_pb2.Sample(environment=environment, prompt="ab", answer="ba", completion=completion, reward=0.5)


def test_samples_are_kept_by_step_and_environment_each_once(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    write_samples(path, 5, [sample("x", "late")])
    write_samples(path, 0, [sample("x", "early"), sample("x", "too")])
    write_samples(path, 5, [sample("y", "other")])
    write_samples(path, 5, [sample("x", "again")])  # an orchestrator that was killed evaluates a second time
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["completion"]) for line in lines] == [
        (0, "early"),
        (0, "too"),
        (5, "other"),
        (5, "again"),
    ]
    assert lines[0] | {"reward": 0.5, "prompt": "ab", "answer": "ba", "environment": "x"} == lines[0]
