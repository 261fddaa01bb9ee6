"""The examples of reward services of one's own, run as processes and asked as the orchestrator would."""

import ast
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict

from surogate.reward.conformance import Verdict, Wishes, check_service
from surogate.rpc.channel import ClientSecurity
from surogate.v1 import job_pb2, reward_pb2, reward_pb2_grpc
from tests.helpers.reward import custom_rewards as custom

EXAMPLES = Path(__file__).parents[3] / "examples"
SERVER = EXAMPLES / "custom_reward" / "python" / "stubs_only.py"


@pytest.fixture(scope="module")
def stub() -> Iterator[Any]:
    with custom.stubs_only() as address, grpc.insecure_channel(address) as channel:
        yield reward_pb2_grpc.RewardServiceStub(channel)


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
    (environment,) = stub.ListEnvironments(reward_pb2.ListEnvironmentsRequest(), timeout=120).environments
    assert environment.id == "vowels"


def test_it_answers_every_rollout_in_order(stub: Any) -> None:
    texts = ["aeiou", "abcd", "123", "xyz"]
    rollouts = [reward_pb2.Rollout(rollout_id=str(i), completion=text) for i, text in enumerate(texts)]
    request = reward_pb2.ScoreRolloutsRequest(environment="vowels", rollouts=rollouts)
    results = stub.ScoreRollouts(request, timeout=120).results
    assert [result.rollout_id for result in results] == ["0", "1", "2", "3"]
    assert [result.score.reward for result in results] == [1.0, 0.25, 0.0, 0.0]
    assert [result.WhichOneof("outcome") for result in results] == ["score", "score", "error", "score"]
    assert results[2].error.message == "no letters in the completion"


def test_it_refuses_what_it_does_not_know(stub: Any) -> None:
    request = reward_pb2.ScoreRolloutsRequest(environment="consonants")
    with pytest.raises(grpc.RpcError, match="there is vowels"):
        stub.ScoreRollouts(request, timeout=120)


@pytest.mark.parametrize(
    ("example", "advice"),
    [
        (custom.sdk, set()),
        (custom.stubs_only, {"health", "reflection", "unknown-argument"}),
        (custom.go, set()),
    ],
    ids=["sdk", "stubs", "go"],
)
async def test_the_examples_keep_to_the_contract(
    example: Callable[[], AbstractContextManager[str]], advice: set[str]
) -> None:
    with example() as address:
        report = await check_service(address, Wishes("vowels"), ClientSecurity())
    assert report.ok
    assert {finding.check for finding in report.findings if finding.verdict is Verdict.ADVICE} == advice


@pytest.mark.parametrize("language", ["python", "typescript", "go"])
def test_its_image_is_built_in_stages_from_a_given_base_and_runs_as_nobody(language: str) -> None:
    folder = EXAMPLES / "custom_reward" / language
    text = (folder / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    given = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)", text, re.MULTILINE))
    assert len(bases) > 1 and {base.strip("${}") for base in bases} == set(given)
    assert all(":" in image and not image.endswith(":latest") for image in given.values())
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", text.rpartition("FROM")[2], re.MULTILINE)
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text.replace("\\\n", " "), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (EXAMPLES.parent / name).exists(), name


def test_the_lockfile_names_no_registry() -> None:
    lock = json.loads((EXAMPLES / "custom_reward" / "typescript" / "package-lock.json").read_text())
    assert len(lock["packages"]) > 20
    assert not [name for name, package in lock["packages"].items() if "resolved" in package]


def test_its_prompts_are_there() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "custom_reward" / "prompts.jsonl").read_text().splitlines()]
    assert rows and all(row["prompt"] for row in rows)


def test_the_grpcurl_requests_fit_the_contract() -> None:
    text = (EXAMPLES / "clients" / "README.md").read_text()
    requests = re.findall(r"-d '(.*?)'\s+\S+ surogate.v1.JobService/(\w+)", text, flags=re.DOTALL)
    assert {method for _, method in requests} == {"CreateJob", "WatchJob", "GetJob", "CancelJob"}
    for body, method in requests:
        ParseDict(json.loads(body), getattr(job_pb2, f"{method}Request")())
