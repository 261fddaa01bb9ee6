"""What a job says it does: stalls go before it, and when they end it is said again."""

from __future__ import annotations

from typing import Any, cast

from orchestrator_svc.grpo.stalls import Stalls
from orchestrator_svc.jobs.context import WRITING_MODEL, JobContext
from surogate.v1 import job_pb2


class Said(JobContext):
    """A job without a store: its statuses, in order."""

    def __init__(self) -> None:
        nothing = cast(Any, None)
        super().__init__(job_id="one", config=nothing, output_dir=nothing, database=nothing, owner="test")
        self.said: list[str] = []

    async def _record(self, happenings: Any, changes: Any, state: Any, also: Any) -> None:
        changed = [item for item in happenings if isinstance(item, job_pb2.StateChanged)]
        self.said += [item.status_message for item in changed]


async def test_an_evaluation_goes_on_after_a_stall() -> None:
    job = Said()
    stalls = Stalls(job)
    await job.running()
    await job.running("evaluating step 2 on math")
    await stalls.begin("the trainer", "it was lost")
    await stalls.end("the trainer")
    await job.running()
    assert job.said == [
        "training",
        "evaluating step 2 on math",
        "waiting for the trainer: it was lost",
        "evaluating step 2 on math",
        "training",
    ]


async def test_what_begins_during_a_stall_is_said_after_it() -> None:
    job = Said()
    stalls = Stalls(job)
    await job.running()
    await stalls.begin("a replica", "it was lost")
    await job.running(WRITING_MODEL)
    assert job.said[-1] == "waiting for a replica: it was lost"
    await stalls.end("a replica")
    assert job.said == ["training", "waiting for a replica: it was lost", WRITING_MODEL]
