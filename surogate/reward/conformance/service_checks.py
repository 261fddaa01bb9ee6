"""The checks of the service as a whole: its list of environments, what it refuses, health, reflection, prompts."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from surogate.errors import SurogateError
from surogate.reward.conformance.findings import Finding, Verdict
from surogate.reward.conformance.subject import RUN, Subject
from surogate.v1 import reward_pb2

_LIST = "RewardService.ListEnvironments"
_TIMEOUT = 10.0
_NOWHERE = "surogate-check-no-such-environment"
_EXAMPLES = 20


def listing(environments: Sequence[reward_pb2.Environment]) -> Finding:
    """The list of environments makes sense."""
    wrong = next(_wrong_listing(environments), None)
    if wrong is None:
        return Finding("listing", Verdict.OK, f"{len(environments)} environments")
    return Finding("listing", Verdict.FAIL, wrong, _LIST, "correct what ListEnvironments answers")


def descriptions(environments: Sequence[reward_pb2.Environment]) -> Finding:
    """What people read and the ledger keeps."""
    bare = [item.id for item in environments if not item.description or not item.version]
    if not bare:
        return Finding("descriptions", Verdict.OK, "every environment has a description and a version")
    return Finding(
        "descriptions",
        Verdict.ADVICE,
        f"without description or version: {', '.join(bare)}",
        _LIST,
        "say what is rewarded in a sentence, and change the version when the same rollout would earn another reward",
    )


def _wrong_listing(environments: Sequence[reward_pb2.Environment]) -> Iterator[str]:
    if not environments:
        yield "no environment at all"
    ids = [item.id for item in environments]
    for item in environments:
        low, high = item.min_reward, item.max_reward
        if not item.id:
            yield "an environment without id"
        if ids.count(item.id) > 1:
            yield f"two environments have the id {item.id!r}"
        if not (math.isfinite(low) and math.isfinite(high)):
            yield f"environment {item.id!r}: min_reward or max_reward is not finite; leave it out where unbounded"
        if item.HasField("min_reward") and item.HasField("max_reward") and low > high:
            yield f"environment {item.id!r}: min_reward {low:g} is above max_reward {high:g}"


async def unknown_environment(stub: Any) -> Finding:
    """A misspelt environment is refused."""
    asked = reward_pb2.ScoreRolloutsRequest(run=RUN, group_id="unknown", environment=_NOWHERE)
    asked.rollouts.add(rollout_id="unknown-0", completion="x", num_tokens=1)
    asked.item_timeout.FromSeconds(int(_TIMEOUT))
    try:
        answer = await stub.ScoreRollouts(asked, timeout=2 * _TIMEOUT)
    except SurogateError as error:
        return Finding(
            "unknown-environment", Verdict.OK, f"an environment that is not there is refused: {error.reason}"
        )
    if not any(result.HasField("score") for result in answer.results):
        return Finding("unknown-environment", Verdict.OK, "an environment that is not there earns no score")
    return Finding(
        "unknown-environment",
        Verdict.FAIL,
        "it scored a rollout for an environment that it does not list",
        "ScoreRolloutsRequest.environment",
        "answer NOT_FOUND for an id that ListEnvironments does not have",
    )


async def unknown_argument(subject: Subject) -> Finding:
    """A misspelt argument is refused."""
    asked = subject.request(["x"])
    asked.args.CopyFrom(subject.args)
    asked.args.update({"surogate_check_no_such_argument": 1})
    try:
        answer = await subject.start(asked)
    except SurogateError as error:
        what = f"an argument that is not there is refused: {error.reason}"
        return Finding("unknown-argument", Verdict.OK, what, environment=subject.environment.id)
    ignored = any(result.HasField("score") for result in answer.results)
    return Finding(
        "unknown-argument",
        Verdict.ADVICE if ignored else Verdict.OK,
        "an argument that is not there is ignored" if ignored else "an argument that is not there earns no score",
        "ScoreRolloutsRequest.args" if ignored else "",
        "answer INVALID_ARGUMENT for unknown args: a misspelt one would go unnoticed" if ignored else "",
        subject.environment.id,
    )


async def health(channel: Any) -> Finding:
    """The standard health service, for probes."""
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT)
    except SurogateError as error:
        return _missing("health", "grpc.health.v1.Health", error, "Kubernetes and load balancers probe it")
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return Finding("health", Verdict.OK, "the health service says SERVING")
    said = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return Finding("health", Verdict.ADVICE, f"the health service says {said}", "grpc.health.v1.Health", "say SERVING")


async def reflection(channel: Any) -> Finding:
    """Server reflection, for people with grpcurl."""

    async def question() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    try:
        async for _ in stub.ServerReflectionInfo(question(), timeout=_TIMEOUT):
            return Finding("reflection", Verdict.OK, "server reflection answers")
    except SurogateError as error:
        return _missing("reflection", "grpc.reflection.v1alpha.ServerReflection", error, "grpcurl needs it")
    return Finding("reflection", Verdict.ADVICE, "server reflection answers nothing", "", "grpcurl needs it")


def _missing(check: str, service: str, error: SurogateError, why: str) -> Finding:
    what = f"no {check} service ({error.reason})"
    return Finding(check, Verdict.ADVICE, what, service, f"not required; {why}")


async def examples(stub: Any, environment: reward_pb2.Environment, args: Struct) -> tuple[Finding, Any]:
    """The prompts that the environment promises; returns the first one to score with, None if there is none."""
    if not environment.has_examples:
        what = "no prompts of its own: a job needs args.dataset"
        return Finding("examples", Verdict.SKIPPED, what, environment=environment.id), None
    requests = reward_pb2.ListExamplesRequest
    try:
        train = await _list(stub, environment, args, requests.SPLIT_TRAIN)
        again = await _list(stub, environment, args, requests.SPLIT_TRAIN)
        held_out = await _list(stub, environment, args, requests.SPLIT_EVAL)
    except SurogateError as error:
        needs = error.reason in ("UNIMPLEMENTED", "INVALID_INPUT")
        return Finding(
            "examples",
            Verdict.SKIPPED if needs else Verdict.FAIL,
            f"prompts cannot be had: {error.message}",
            "" if needs else "EnvironmentService.ListExamples",
            "give the arguments of the job with --set KEY=VALUE"
            if needs
            else "stream the examples, or has_examples: false",
            environment.id,
        ), None
    wrong = next(_wrong_examples(train, again, held_out), None)
    first = train[0] if train else None
    if wrong is None:
        what = f"prompts come in a fixed order, and none is both trained on and held out ({len(train)} looked at)"
        return Finding("examples", Verdict.OK, what, environment=environment.id), first
    do = "see ListExamples in reward.proto"
    return Finding("examples", Verdict.FAIL, wrong, "EnvironmentService.ListExamples", do, environment.id), first


async def turns(stub: Any, subject: Subject) -> Finding:
    """A turn is answered, and answered again in the same way: a call that was cut off is made again."""
    asked = reward_pb2.TakeTurnRequest(
        run=RUN, group_id="turns", rollout_id="turns-0", environment=subject.environment.id, turn=1
    )
    asked.args.CopyFrom(subject.args)
    asked.example.CopyFrom(subject.example)
    asked.messages.add(role="assistant", content="Is it 7?")
    asked.timeout.FromSeconds(int(_TIMEOUT))
    do = "answer a turn by what the request has (messages, state, example) and nothing else"
    where = "EnvironmentService.TakeTurn"
    try:
        first, again = [await stub.TakeTurn(asked, timeout=2 * _TIMEOUT) for _ in range(2)]
    except SurogateError as error:
        what = f"a turn is not answered: {error.reason}: {error.message}"
        return Finding("turns", Verdict.FAIL, what, where, do, subject.environment.id)
    if subject.environment.deterministic and first != again:
        what = "the same turn was answered differently when it was asked again"
        return Finding("turns", Verdict.FAIL, what, where, do, subject.environment.id)
    what = f"a turn is answered by {len(first.messages)} messages" if first.messages else "a turn ends the episode"
    return Finding("turns", Verdict.OK, what, environment=subject.environment.id)


def _wrong_examples(
    train: Sequence[reward_pb2.Example], again: Sequence[reward_pb2.Example], held_out: Sequence[reward_pb2.Example]
) -> Iterator[str]:
    if not train:
        yield "no example to train on"
    if max(len(train), len(held_out)) > _EXAMPLES:
        yield f"more than max_examples ({_EXAMPLES}) examples"
    if [item.id for item in train] != [item.id for item in again]:
        yield "the same seed gave other examples, or another order"
    if len({item.id for item in train}) < len(train):
        yield "two examples have the same id"
    if any(not item.prompt for item in (*train, *held_out)):
        yield "an example without prompt"
    trained_on = {_prompt(item) for item in train}
    both = next((item for item in held_out if _prompt(item) in trained_on), None)
    if both is not None:
        yield f"example {both.id!r} is held out, and its prompt is trained on"


def _prompt(example: reward_pb2.Example) -> tuple[tuple[str, str], ...]:
    return tuple((message.role, message.content) for message in example.prompt)


async def _list(stub: Any, environment: reward_pb2.Environment, args: Struct, split: Any) -> list[reward_pb2.Example]:
    asked = reward_pb2.ListExamplesRequest(
        environment=environment.id, args=args, split=split, seed=7, max_examples=_EXAMPLES
    )
    found = []
    async for example in stub.ListExamples(asked, timeout=6 * _TIMEOUT):
        found.append(example)
        if len(found) > _EXAMPLES:
            break
    return found
