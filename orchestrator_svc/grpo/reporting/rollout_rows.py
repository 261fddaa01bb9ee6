"""Scored rollouts of a batch as rows of the rollout store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from google.protobuf.json_format import MessageToDict

from orchestrator_svc.grpo.batch import Batch
from orchestrator_svc.grpo.groups import Group
from surogate.structs import from_struct
from surogate.v1 import common_pb2

TRAINED = "trained"


def rollout_rows(batch: Batch) -> list[dict[str, Any]]:
    """A row for every rollout of the batch that was scored, by the columns of `surogate.rollouts.SCHEMA`."""
    now = datetime.now(UTC)
    fates = [(group, TRAINED) for group in batch.groups]
    fates += [(drop.group, str(drop.cause)) for drop in batch.dropped if drop.group in batch.scored and drop.group]
    ordered = sorted(fates, key=lambda item: item[0].draw.ordinal)
    return [row for group, fate in ordered for row in _rows(group, batch.step, fate, now)]


def _rows(group: Group, step: int, fate: str, now: datetime) -> Iterator[dict[str, Any]]:
    prompt = group.draw.prompt
    shared = {
        "step": step,
        "group_id": group.draw.group_id,
        "environment": prompt.environment,
        "example_id": prompt.example.id,
        "prompt": _messages(prompt.example.prompt),
        "answer": prompt.example.answer,
        "fields": json.dumps(from_struct(prompt.example.fields), ensure_ascii=False),
        "prompt_ids": prompt.token_ids,
        "fate": fate,
        "temperature": group.temperature,
        "scored_by": group.scored_by,
        "time": now,
    }
    for rollout in group.rollouts:
        yield {
            **shared,
            "rollout_id": rollout.rollout_id,
            "completion": rollout.text,
            "turns": rollout.turns,
            "messages": _messages(rollout.messages),
            "state": json.dumps(from_struct(rollout.state), ensure_ascii=False),
            "reward": rollout.reward,
            "components": list(rollout.components.items()),
            "finish_reason": "length" if rollout.truncated else "stop",
            "oldest_version": rollout.oldest_version,
            "newest_version": max(span.policy_version for span in rollout.spans),
            "token_ids": rollout.token_ids,
            "logprobs": rollout.logprobs,
            "sampled": rollout.sampled,
        }


def _messages(messages: Iterable[common_pb2.ChatMessage]) -> str:
    return json.dumps([MessageToDict(message) for message in messages], ensure_ascii=False)
