"""Rewards through gRPC, the client included: items a second, and how long a call takes.

Services are processes of their own: `quick` is a reward of a microsecond on the SDK, `math` and `code` are built in.
The client is this process, with the channel that the orchestrator scores by.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surogate.process import start_service
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.structs import to_struct
from surogate.v1 import common_pb2, reward_pb2, reward_pb2_grpc
from tests.bench.table import Options, Table

AIM = 20_000.0
"""Items a second of the quick reward, in groups of 16."""

_PROGRAM = """```python
n = int(input())
print(sum(range(n + 1)))
```"""


@dataclass(frozen=True)
class Case:
    """One row."""

    reward: str
    group: int
    seconds: float
    """How long it is measured."""
    at_once: int = 16
    """Calls under way."""
    completion: str = "The answer is 42, as everybody knows who has read the book to its end."
    answer: str = "42"
    fields: str = "{}"
    aim: float | None = None

    @property
    def module(self) -> str:
        return "tests.bench.quick_reward" if self.reward == "quick" else "reward_svc"

    def request(self, number: int) -> reward_pb2.ScoreRolloutsRequest:
        """A group as a job sends it."""
        asked = reward_pb2.ScoreRolloutsRequest(
            run="jobs/bench", group_id=str(number), environment=self.reward, args=to_struct({})
        )
        asked.example.id, asked.example.answer = str(number), self.answer
        asked.example.prompt.add(role="user", content="What is the answer to everything?")
        asked.example.fields.CopyFrom(to_struct(json.loads(self.fields)))
        asked.item_timeout.FromSeconds(60)
        for index in range(self.group):
            asked.rollouts.add(
                rollout_id=f"{number}-{index}",
                completion=self.completion,
                num_tokens=18,
                finish_reason=common_pb2.FINISH_REASON_STOP,
            )
        return asked


CASES = (
    Case("quick", 16, 5.0, aim=AIM),
    Case("quick", 1, 5.0),
    Case("quick", 128, 5.0),
    Case("math", 16, 5.0, completion=r"So it is \boxed{\frac{84}{2}}."),
    Case(
        "code",
        4,
        20.0,
        at_once=4,
        completion=_PROGRAM,
        fields='{"tests": [{"input": "3", "output": "6"}, {"input": "10", "output": "55"}]}',
    ),
)


async def run(options: Options) -> Table:
    """Items a second and the 50th and 99th percentile of a call, the medians over the rounds."""
    rows = []
    for case in CASES:
        seconds, rounds = (0.3, 1) if options.quick else (case.seconds, 3)
        async with _stub(case) as stub:
            found = [await _rate(stub, case, seconds) for _ in range(options.rounds or rounds)]
        rate, half, last = (statistics.median(values) for values in zip(*found, strict=True))
        rows.append((case.reward, case.group, case.at_once, rate, half * 1000, last * 1000, case.aim))
    return Table(("reward", "group", "calls at once", "items/s", "p50 ms", "p99 ms", "aim"), rows)


@asynccontextmanager
async def _stub(case: Case) -> AsyncIterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        service = await start_service(case.module, log_file=Path(folder) / "log")
        try:
            async with open_channel(service.address, ClientSecurity()) as channel:
                yield reward_pb2_grpc.RewardServiceStub(channel)
        finally:
            await service.stop()


async def _rate(stub: Any, case: Case, seconds: float) -> tuple[float, float, float]:
    """Items a second, and the median and the 99th percentile of a call in seconds."""
    await stub.ScoreRollouts(case.request(0))  # what is started at the first call is not measured
    numbers = iter(range(1, 1 << 31))
    took: list[float] = []
    began = time.perf_counter()

    async def worker(numbers: Iterator[int]) -> None:
        while time.perf_counter() - began < seconds:
            sent = time.perf_counter()
            answer = await stub.ScoreRollouts(case.request(next(numbers)), timeout=60)
            took.append(time.perf_counter() - sent)
            assert [result.score.reward for result in answer.results] == [1.0] * case.group

    await asyncio.gather(*(worker(numbers) for _ in range(case.at_once)))
    elapsed = time.perf_counter() - began
    return len(took) * case.group / elapsed, float(np.quantile(took, 0.5)), float(np.quantile(took, 0.99))
