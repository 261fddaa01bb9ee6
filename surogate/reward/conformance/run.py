"""Runs all checks against a service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.struct_pb2 import Struct

from surogate.errors import NotFoundError, SurogateError
from surogate.reward.conformance import service_checks
from surogate.reward.conformance.checks import CHECKS, run_check
from surogate.reward.conformance.findings import Finding, Report, Verdict
from surogate.reward.conformance.subject import Subject
from surogate.reward.dataset import read_rows
from surogate.reward.prompts import DatasetArgs, to_example
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.structs import to_struct
from surogate.v1 import common_pb2, reward_pb2, reward_pb2_grpc

_ALIVE_SECONDS = 10.0


@dataclass(frozen=True)
class Wishes:
    """What to check."""

    environment: str | None = None
    """Only this environment; None means all that the service lists."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """`env[].args` of the job."""
    item_timeout: float = 10.0
    """Seconds that one rollout may take."""


async def check_service(address: str, wishes: Wishes, security: ClientSecurity | None = None) -> Report:
    """Asks the service at `address` whatever jobs ask.

    Raises:
        UnavailableError: Nothing answers there.
        NotFoundError: The service does not list the wished environment.
        InvalidInputError: `args.dataset` cannot be read.
    """
    async with open_channel(address, security) as channel:
        stub: Any = reward_pb2_grpc.RewardServiceStub(channel)
        listed = await stub.ListEnvironments(reward_pb2.ListEnvironmentsRequest(), timeout=_ALIVE_SECONDS)
        chosen = [item for item in listed.environments if wishes.environment in (None, item.id)]
        if wishes.environment is not None and not chosen:
            names = ", ".join(item.id for item in listed.environments) or "none"
            raise NotFoundError(f"{address} has no environment {wishes.environment!r}; it has {names}")
        report = Report(address, [item.id for item in chosen])
        report.findings += [service_checks.listing(listed.environments), service_checks.descriptions(chosen)]
        report.findings += [await service_checks.health(channel), await service_checks.reflection(channel)]
        report.findings.append(await service_checks.unknown_environment(stub))
        for environment in chosen:
            report.findings += await _check_environment(channel, environment, wishes)
            if await _is_dead(stub):
                break
        return report


async def _check_environment(channel: Any, environment: reward_pb2.Environment, wishes: Wishes) -> list[Finding]:
    prompts: Any = reward_pb2_grpc.EnvironmentServiceStub(channel)
    stub: Any = reward_pb2_grpc.RewardServiceStub(channel)
    args = to_struct(wishes.args)
    listed, example = await service_checks.examples(prompts, environment, args)
    unfed = environment.has_examples and example is None and wishes.environment is None
    example = example or _example(wishes.args)
    subject = Subject(stub, environment, example, args, wishes.item_timeout, unfed=unfed)
    first, *others = CHECKS
    scores = await run_check(first, subject)
    findings = [listed, scores]
    if scores.verdict is not Verdict.OK:
        return [*findings, *subject.book.findings()]  # where nothing earns a score, there is nothing to compare
    findings.append(await service_checks.unknown_argument(subject))
    if environment.multi_turn:
        findings.append(await service_checks.turns(prompts, subject))
    for name in others:
        found = await run_check(name, subject)
        findings.append(found)
        if found.verdict is Verdict.FAIL and await _is_dead(stub):
            findings.append(_died(name, environment))
            break
    return [*findings, *subject.book.findings()]


def _example(args: Mapping[str, Any]) -> reward_pb2.Example:
    """The first row of `args.dataset`, as a job would send it; without one, a prompt of our own."""
    path = args.get("dataset")
    if isinstance(path, str) and Path(path).expanduser().is_file():
        known = {key: value for key, value in args.items() if key in DatasetArgs.model_fields}
        return to_example(DatasetArgs.model_validate(known), 1, read_rows(path)[0])
    message = common_pb2.ChatMessage(role="user", content="What is 40 + 2?")
    return reward_pb2.Example(id="check-1", prompt=[message], answer="42", fields=Struct())


async def _is_dead(stub: Any) -> bool:
    try:
        await stub.ListEnvironments(reward_pb2.ListEnvironmentsRequest(), timeout=_ALIVE_SECONDS)
    except SurogateError:
        return True
    return False


def _died(check: str, environment: reward_pb2.Environment) -> Finding:
    return Finding(
        "alive",
        Verdict.FAIL,
        f"since `{check}` the service does not answer any more; the other checks were not made",
        "the whole service",
        "see its log: nothing that is sent may end the service or block it",
        environment.id,
    )
