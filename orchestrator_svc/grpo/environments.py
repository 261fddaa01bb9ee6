"""The environments of a job, opened: where each is, how many turns it takes, and its examples."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Set
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from orchestrator_svc.grpo.configured.settings import EnvironmentSpec, Settings
from orchestrator_svc.grpo.prompts.dataset import prompt_digest
from orchestrator_svc.grpo.prompts.gathered import Examples, Wanted, gather_examples
from orchestrator_svc.grpo.rewards.answers import words_of
from orchestrator_svc.grpo.rewards.scoring import Environment
from orchestrator_svc.grpo.rewards.services import BuiltIn, Custom
from orchestrator_svc.grpo.tasks import together
from orchestrator_svc.launchers.base import READY_TIMEOUT, Worker
from surogate.errors import (
    ConfigError,
    InvalidInputError,
    NotFoundError,
    SurogateError,
    UnavailableError,
    UnimplementedError,
    Violation,
)
from surogate.structs import to_struct
from surogate.v1 import reward_pb2

LIST_TIMEOUT = 120.0
"""Seconds that a service may take to list its environments: those of packages are imported for it."""

MAX_TURNS = 16
"""Most turns of an episode where the configuration does not say."""

SERVICE_KEY = "env[]"
"""What a reward service, which knows no orch.yaml, calls the environment that it was asked about."""


@dataclass(frozen=True)
class OpenEnvironment:
    """An environment whose service answers, and its examples."""

    spec: EnvironmentSpec
    environment: Environment
    examples: Examples


async def open_environments(
    settings: Settings, rewards: Mapping[str, Worker], stack: AsyncExitStack
) -> list[OpenEnvironment]:
    """Reaches every environment and gathers its examples; `stack` closes what was opened.

    `rewards` are the job's own reward services by their images; the built-in one has none: `""`.

    Raises:
        ConfigError: An environment has no examples, or its arguments are wrong.
        SurogateError: A service cannot be reached.
    """
    await asyncio.gather(*(reward.ready(READY_TIMEOUT) for reward in rewards.values()))
    opened = await together(_open(spec, rewards, settings.plan.seed, stack) for spec in settings.environments)
    held_out = {prompt_digest(example) for item in opened for example in item.examples.held_out}
    return [_kept_apart(item, held_out) for item in opened]


async def _open(
    spec: EnvironmentSpec, rewards: Mapping[str, Worker], seed: int, stack: AsyncExitStack
) -> OpenEnvironment:
    environment = service_of(spec, rewards)
    stack.push_async_callback(environment.endpoint.close)
    try:
        environment = replace(environment, max_turns=await _max_turns(spec, environment))
        wanted = Wanted(environment, spec.config_key, train=spec.train, held_out=spec.held_out)
        return OpenEnvironment(spec, environment, await gather_examples(wanted, seed=seed))
    except NotFoundError as error:
        raise ConfigError.of([Violation(f"{spec.config_key}.id", str(error))]) from error
    except InvalidInputError as error:
        raise _at_home(error, spec.config_key) from error
    except UnavailableError as error:
        if spec.address is None:
            raise
        what = f"{spec.config_key}.address: no reward service answers at {spec.address}: {error}"
        raise UnavailableError(what, reason=error.reason) from error
    except SurogateError as error:
        named = copy.copy(error)
        named.message = f"{spec.config_key}: environment {spec.id} cannot be opened: {words_of(error)}"
        raise named from error


async def _max_turns(spec: EnvironmentSpec, environment: Environment) -> int:
    """Most turns of an episode; 0 for an environment that does not answer turns, as far as its service says."""
    stub = await environment.endpoint.reward()
    try:
        listed = await stub.ListEnvironments(reward_pb2.ListEnvironmentsRequest(), timeout=LIST_TIMEOUT)
    except UnimplementedError:
        multi_turn = False
    else:
        multi_turn = any(item.id == spec.id and item.multi_turn for item in listed.environments)
    if multi_turn:
        return spec.max_turns or MAX_TURNS
    if spec.max_turns is not None:
        message = f"has no meaning for environment {spec.id}, which does not answer turns: remove it"
        raise ConfigError.of([Violation(f"{spec.config_key}.max_turns", message)])
    return 0


def _at_home(error: InvalidInputError, config_key: str) -> InvalidInputError:
    """The error with the keys of the job's own file in place of `env[]`, by which a reward service calls them."""
    found = [Violation(item.field.replace(SERVICE_KEY, config_key, 1), item.description) for item in error.violations]
    return ConfigError.of(found) if found else error


def _kept_apart(item: OpenEnvironment, held_out: Set[int]) -> OpenEnvironment:
    """The environment without training examples whose prompt is held out, in whichever environment that is."""
    train = [example for example in item.examples.train if prompt_digest(example) not in held_out]
    if item.spec.train and not train:
        message = f"environment {item.spec.id} has no examples to train on, other than held-out ones"
        raise ConfigError.of([Violation(item.spec.config_key, message)])
    return replace(item, examples=replace(item.examples, train=train))


def service_of(spec: EnvironmentSpec, rewards: Mapping[str, Worker]) -> Environment:
    """The environment at its own address, else at the job's own service of its image, the built-in one without."""
    args = to_struct(spec.args)
    if spec.address:
        endpoint: BuiltIn | Custom = Custom(spec.address, spec.security)
    else:
        endpoint = BuiltIn(rewards[spec.image], spec.image or "built-in")
    return Environment(spec.key, spec.id, args, endpoint, spec.timeout)
