"""What ReplaceReward must find before a running job is given another reward service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from orchestrator_svc.jobstore.messages import ENDED
from orchestrator_svc.jobstore.reward_services import MULTI_TURN, ReplacedService
from surogate.config.env import EnvConfig
from surogate.config.job import GrpoJob, resolve_job
from surogate.config.problems import violations_of
from surogate.errors import (
    ConfigError,
    FailedPreconditionError,
    InvalidInputError,
    SurogateError,
    UnauthenticatedError,
    Violation,
)
from surogate.rpc.channel import open_channel
from surogate.v1 import job_pb2, reward_pb2, reward_pb2_grpc

_ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class Needed:
    """What a service must have to take the place of another."""

    environment_id: str
    multi_turn: bool
    """Whether it must answer turns: the job has episodes of this environment."""


def wanted_service(row: Any, request: job_pb2.ReplaceRewardRequest) -> tuple[ReplacedService, Needed]:
    """The service that the request asks for, and what it must have.

    Raises:
        FailedPreconditionError: The job has ended, or is not a GRPO job.
        InvalidInputError: It has no such environment.
    """
    if row.state in ENDED:
        raise FailedPreconditionError(f"jobs/{row.job_id} has ended", reason="JOB_ENDED")
    job = resolve_job(row.config)
    if not isinstance(job, GrpoJob):
        raise FailedPreconditionError(f"jobs/{row.job_id} is of kind {job.kind}: it has no rewards", reason="NOT_GRPO")
    labels = {env.label: env.id for env in job.orch.env}
    environment = request.environment or (next(iter(labels)) if len(labels) == 1 else "")
    if environment not in labels:
        why = f"must be one of {', '.join(labels)}, got {request.environment!r}"
        raise InvalidInputError(f"environment {why}", violations=[Violation("environment", why)])
    service = ReplacedService(environment, request.shadow, request.address, request.tls, request.token_env)
    return service, Needed(labels[environment], environment in row.runner_state.get(MULTI_TURN, ()))


async def check_service(service: ReplacedService, needed: Needed) -> None:
    """Asks the service whether it is there, and has what is needed.

    Raises:
        InvalidInputError: It does not answer, has other environments, or answers no turns where it must.
    """
    from orchestrator_svc.grpo.configured.setup import service_security

    environment_id = needed.environment_id
    env = _environment(service, environment_id)
    channel = open_channel(service.address, service_security(env, "request"))
    try:
        stub: Any = reward_pb2_grpc.RewardServiceStub(channel)
        found = await stub.ListEnvironments(reward_pb2.ListEnvironmentsRequest(), timeout=_ANSWER_SECONDS)
    except ConfigError:
        raise
    except SurogateError as error:
        hint = "; give token_env" if isinstance(error, UnauthenticatedError) else ""
        raise _refused(f"{service.address} does not answer as a reward service: {error}{hint}") from error
    finally:
        await channel.close(None)
    listed = {item.id: item for item in found.environments}
    if environment_id not in listed:
        raise _refused(f"{service.address} has no environment {environment_id}; it has {', '.join(listed) or 'none'}")
    if needed.multi_turn and not listed[environment_id].multi_turn:
        raise _refused(
            f"the environment {environment_id} of {service.address} answers no turns (multi_turn in ListEnvironments), "
            "and the rollouts of this job are episodes"
        )


def _environment(service: ReplacedService, environment_id: str) -> EnvConfig:
    given = {"address": service.address, "tls": service.tls, "token_env": service.token_env or None}
    try:
        return EnvConfig.model_validate({"id": environment_id, **given})
    except ValidationError as error:
        raise ConfigError.of(violations_of(error)) from error


def _refused(why: str) -> InvalidInputError:
    return InvalidInputError(why, violations=[Violation("address", why)])
