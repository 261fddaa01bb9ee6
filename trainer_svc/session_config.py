"""The configuration of a session: checked before any worker starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf.struct_pb2 import Struct
from pydantic import ValidationError

from surogate.config.job import resolve_job
from surogate.config.problems import violations_of
from surogate.config.train import TrainConfig
from surogate.errors import ConfigError
from surogate.structs import from_struct
from trainer_svc.rank_plan import RankPlan, plan_ranks

Kind = Literal["pt", "sft", "grpo"]


@dataclass(frozen=True)
class SessionConfig:
    """What the front needs to know of it; the worker reads the whole."""

    kind: Kind
    """What the session does."""
    max_steps: int
    """Optimiser steps in all; below 1 if the data decides."""
    ranks: RankPlan
    """The processes that train."""
    own_base: bool = False
    """Whether adapters are trained on a base that is not the model as named, so that replicas must be given it."""


def parse_session_config(config: Struct) -> SessionConfig:
    """Checks `{kind, train}`. Raises ConfigError that names the keys."""
    data: dict[str, Any] = from_struct(config)
    if data.get("kind") == "grpo":
        train = _train_of_grpo(data)
        return SessionConfig("grpo", train.max_steps, plan_ranks(train), own_base=train.quantizes)
    job = resolve_job(data)
    return SessionConfig(job.kind, job.train.max_steps, plan_ranks(job.train))


def _train_of_grpo(data: dict[str, Any]) -> TrainConfig:
    """A session has one of the three files of a GRPO job; whether they agree is seen where all three are."""
    try:
        return TrainConfig.model_validate(data.get("train"))
    except ValidationError as error:
        raise ConfigError.of(violations_of(error, "train")) from error
