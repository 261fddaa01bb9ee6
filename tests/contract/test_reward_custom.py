"""The example of a reward service of one's own, run as a process and asked as the orchestrator would."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict

from surogate.v1 import job_pb2, reward_pb2, reward_pb2_grpc

EXAMPLES = Path(__file__).parents[2] / "examples"
SERVER = EXAMPLES / "custom_reward" / "python" / "server.py"


@pytest.fixture(scope="module")
def stub() -> Iterator[Any]:
    command = [sys.executable, str(SERVER), "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = process.stdout.readline().split()[-1]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield reward_pb2_grpc.RewardServiceStub(channel)
        process.kill()


def test_it_is_short_and_needs_only_the_stubs_and_grpcio() -> None:
    text = SERVER.read_text()
    assert len(text.splitlines()) < 60
    modules = {
        (node.module if isinstance(node, ast.ImportFrom) else name.name).partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert modules - set(sys.stdlib_module_names) == {"grpc", "surogate"}
    assert re.findall(r"from (surogate\S*) import", text) == ["surogate.v1"]


def test_it_says_what_it_rewards(stub: Any) -> None:
    (environment,) = stub.ListEnvironments(reward_pb2.ListEnvironmentsRequest(), timeout=10).environments
    assert environment.id == "vowels"


def test_it_answers_every_rollout_in_order(stub: Any) -> None:
    texts = ["aeiou", "abcd", "123", "xyz"]
    rollouts = [reward_pb2.Rollout(rollout_id=str(i), completion=text) for i, text in enumerate(texts)]
    request = reward_pb2.ScoreRolloutsRequest(environment="vowels", rollouts=rollouts)
    results = stub.ScoreRollouts(request, timeout=10).results
    assert [result.rollout_id for result in results] == ["0", "1", "2", "3"]
    assert [result.score.reward for result in results] == [1.0, 0.25, 0.0, 0.0]
    assert [result.WhichOneof("outcome") for result in results] == ["score", "score", "error", "score"]
    assert results[2].error.message == "no letters in the completion"


def test_it_refuses_what_it_does_not_know(stub: Any) -> None:
    request = reward_pb2.ScoreRolloutsRequest(environment="consonants")
    with pytest.raises(grpc.RpcError, match="there is vowels"):
        stub.ScoreRollouts(request, timeout=10)


def test_its_prompts_are_there() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "custom_reward" / "prompts.jsonl").read_text().splitlines()]
    assert rows and all(row["prompt"] for row in rows)


def test_the_grpcurl_requests_fit_the_contract() -> None:
    text = (EXAMPLES / "clients" / "README.md").read_text()
    requests = re.findall(r"-d '(.*?)'\s+\S+ surogate.v1.JobService/(\w+)", text, flags=re.DOTALL)
    assert {method for _, method in requests} == {"CreateJob", "WatchJob", "GetJob", "CancelJob"}
    for body, method in requests:
        ParseDict(json.loads(body), getattr(job_pb2, f"{method}Request")())
