"""`surogate rollouts rescore`: what another reward would have given for the rollouts that a job stored."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct
from rich.console import Console
from rich.table import Table

from surogate.cli.console import all_shown
from surogate.cli.exits import OK, reaching
from surogate.cli.rewards.reward_service import START_REWARD, reward_channel
from surogate.cli.rollouts import Row, Selection
from surogate.errors import DeadlineError
from surogate.rollouts import SCHEMA, num_sampled, write_table
from surogate.rpc.status import from_status
from surogate.structs import to_struct
from surogate.v1 import common_pb2, reward_pb2, reward_pb2_grpc
from surogate.visible import visible

_CONCURRENT = 16
_GRACE = 5.0
_REASONS = {"stop": common_pb2.FINISH_REASON_STOP, "length": common_pb2.FINISH_REASON_LENGTH}


@dataclass(frozen=True)
class NewReward:
    """The reward to score with."""

    address: str | None
    """HOST:PORT of its service; None is the built-in one, started for this."""
    environment: str
    args: dict[str, Any]
    item_timeout: float
    """Seconds that one rollout may take."""


def rescore(output_dir: Path, chosen: Selection, reward: NewReward, target: Path | None, *, as_json: bool) -> int:
    """Scores the chosen rollouts again, says how far the rewards agree, and writes them where `target` says."""
    rows = sorted(chosen.rows(output_dir), key=itemgetter("group_id", "rollout_id"))
    groups = [list(group) for _, group in itertools.groupby(rows, key=itemgetter("group_id"))]
    where = reward.address or "this machine"
    with reaching("reward service", where, START_REWARD):
        problems = asyncio.run(_score_all(groups, reward))
    if target is not None:
        _write(target, rows)
    summary = _summary(rows, problems)
    if as_json:
        sys.stdout.write(f"{json.dumps(summary)}\n")
    else:
        _print(summary)
    return OK


async def _score_all(groups: Sequence[list[Row]], reward: NewReward) -> list[str]:
    """Puts `new_reward` into every row: NaN where it could not be scored; returns what went wrong."""
    problems: list[str] = []
    room = asyncio.Semaphore(_CONCURRENT)
    async with reward_channel(reward.address) as channel:
        stub: Any = reward_pb2_grpc.RewardServiceStub(channel)

        async def score(group: list[Row]) -> None:
            async with room:
                try:
                    answers = await _score(stub, group, reward)
                except DeadlineError as error:  # all else another group would meet as well
                    answers = [error.message] * len(group)
            for row, answer in zip(group, answers, strict=True):
                row["new_reward"] = answer if isinstance(answer, float) else float("nan")
                if isinstance(answer, str):
                    problems.append(f"{row['rollout_id']}: {answer}")

        await all_shown("scoring", (score(group) for group in groups))
    return problems


async def _score(stub: Any, group: Sequence[Row], reward: NewReward) -> list[float | str]:
    request = reward_pb2.ScoreRolloutsRequest(
        run="rescore",
        group_id=group[0]["group_id"],
        environment=reward.environment,
        args=to_struct(reward.args),
        example=_example(group[0]),
        item_timeout=Duration(nanos=0, seconds=max(1, round(reward.item_timeout))),
    )
    for row in group:
        request.rollouts.add(
            rollout_id=row["rollout_id"],
            completion=row["completion"],
            num_tokens=num_sampled(row),
            finish_reason=_REASONS.get(row["finish_reason"], common_pb2.FINISH_REASON_UNSPECIFIED),
            messages=_messages(row["messages"] or "[]"),
            state=ParseDict(json.loads(row["state"] or "{}"), Struct()),
        )
    response = await stub.ScoreRollouts(request, timeout=len(group) * reward.item_timeout + _GRACE)
    by_id = {result.rollout_id: result for result in response.results}
    return [_answer(by_id.get(row["rollout_id"])) for row in group]


def _answer(result: reward_pb2.RolloutResult | None) -> float | str:
    if result is None:
        return "no answer"
    if result.WhichOneof("outcome") == "score":
        return float(result.score.reward)
    return from_status(result.error).message or "neither a score nor an error"


def _example(row: Row) -> reward_pb2.Example:
    fields = ParseDict(json.loads(row["fields"]), Struct())
    return reward_pb2.Example(
        id=row["example_id"], prompt=_messages(row["prompt"]), answer=row["answer"], fields=fields
    )


def _messages(text: str) -> list[common_pb2.ChatMessage]:
    return [ParseDict(message, common_pb2.ChatMessage()) for message in json.loads(text)]


def _summary(rows: Sequence[Row], problems: Sequence[str]) -> dict[str, Any]:
    pairs = np.array([(row["reward"], row["new_reward"]) for row in rows], np.float64).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    found: dict[str, Any] = {"rollouts": len(rows), "scored": len(pairs), "failed": len(problems)}
    if problems:
        found["first_failure"] = problems[0]
    if not len(pairs):
        return found
    found |= {"mean_before": float(pairs[:, 0].mean()), "mean_now": float(pairs[:, 1].mean())}
    found["agreement"] = float((np.abs(pairs[:, 0] - pairs[:, 1]) <= 1e-6).mean())
    if len(pairs) > 1 and pairs.std(axis=0).all():
        found["correlation"] = float(np.corrcoef(pairs.T)[0, 1])
    return found


def _print(summary: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else visible(str(value)))
    Console(markup=False).print(table)


def _write(target: Path, rows: Sequence[Row]) -> None:
    write_table(target, rows, SCHEMA.append(pa.field("new_reward", pa.float64())))
