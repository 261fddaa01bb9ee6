"""`json-schema`: completions that are JSON and that a schema accepts."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field

from reward_svc.rewards.json_value import first_error, read_value, validator_of
from surogate.errors import InvalidInputError
from surogate.reward.prompts import DatasetArgs, DatasetEnvironment, checked, own_or_given
from surogate.v1 import reward_pb2

MAX_CHARS = 100_000


class JsonSchemaArgs(DatasetArgs):
    """Arguments of `json-schema`."""

    json_schema: Annotated[dict[str, Any] | None, checked(validator_of)] = Field(None, alias="schema")
    """JSON Schema (draft 2020-12, or what its `$schema` names). Unset: each example's own, from `schema_field`."""
    schema_field: str = "schema"
    """Column with the example's own schema (an object or its text), which comes before `schema`."""
    parsed_reward: float = Field(0.0, ge=0, le=1)
    """Reward for JSON that the schema does not accept."""
    timeout: float = Field(1.0, gt=0, le=60)
    """Seconds that a check may take. What takes longer is an error of that rollout, not a reward."""

    model_config = DatasetArgs.model_config | {"populate_by_name": True}


class JsonSchema(DatasetEnvironment[JsonSchemaArgs]):
    """Rewards 1 for JSON that the schema accepts, `parsed_reward` for other JSON, else 0."""

    id = "json-schema"
    description = "Answer in JSON. Reward: 1 when the schema accepts it, parsed_reward when it is JSON at all, else 0."
    args_model = JsonSchemaArgs

    def score(self, args: JsonSchemaArgs, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> reward_pb2.Score:
        """Validates the last fenced block, else the whole completion. Raises InvalidInputError for a wrong schema."""
        try:
            validator = _validator(json.dumps(_schema(args, example)))
            if len(rollout.completion) > MAX_CHARS:
                return _score(0.0, f"longer than {MAX_CHARS} characters")
            try:
                value = read_value(rollout.completion)
            except ValueError as error:
                return _score(0.0, f"not JSON: {error}")
            wrong = first_error(validator, value, args.timeout)
        except ValueError as error:
            raise InvalidInputError(f"json-schema: the schema {error}") from error
        return _score(1.0 if wrong is None else args.parsed_reward, wrong or "", parsed=1.0, valid=float(wrong is None))


def _schema(args: JsonSchemaArgs, example: reward_pb2.Example) -> Any:
    schema = own_or_given(example, args.schema_field, args.json_schema)
    if isinstance(schema, str):
        schema = json.loads(schema)
    if schema is None:
        raise ValueError(f"is missing: set args.schema, or have one in the column {args.schema_field!r}")
    return schema


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    return validator_of(json.loads(schema))


def _score(reward: float, explanation: str, *, parsed: float = 0.0, valid: float = 0.0) -> reward_pb2.Score:
    return reward_pb2.Score(reward=reward, components={"parsed": parsed, "valid": valid}, explanation=explanation)
