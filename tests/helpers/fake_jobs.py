"""An orchestrator and an inference service by hand, served from a thread as another process would serve them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from google.protobuf.empty_pb2 import Empty

from surogate.config.service import ServiceSettings
from surogate.errors import ConfigError, NotFoundError, UnavailableError, Violation
from surogate.rpc.server import RpcServer
from surogate.rpc.status import to_status
from surogate.v1 import common_pb2, inference_pb2, inference_pb2_grpc, job_pb2, job_pb2_grpc

Job = job_pb2.Job


class FakeOrchestrator(job_pb2_grpc.JobServiceServicer):
    """Jobs in memory. Each has the same `events` (five steps unless given) and then succeeds, or fails with `error`.

    WatchJob breaks off after each `break_after` events; with `endless` a job goes on until it is cancelled.
    """

    def __init__(
        self,
        events: Sequence[job_pb2.JobEvent] = (),
        break_after: int | None = None,
        *,
        error: Exception | None = None,
        endless: bool = False,
    ) -> None:
        self.jobs: dict[str, Job] = {}
        self.by_request: dict[str, str] = {}
        self.events = list(events) or [_step(number) for number in range(1, 6)]
        self.error = error
        self.endless = endless
        self._cancelled = asyncio.Event()
        self.break_after = break_after
        self.watched_from: list[int] = []

    async def CreateJob(self, request: Any, context: Any) -> Job:
        train = request.config["train"]
        if "modle" in train:
            raise ConfigError.of([Violation("train.modle", "unknown key; did you mean model?")])
        if request.request_id in self.by_request:
            return self.jobs[self.by_request[request.request_id]]
        job = Job(name=f"jobs/{request.job_id or len(self.jobs)}", config=request.config, state=Job.STATE_QUEUED)
        if not request.validate_only:
            self.jobs[job.name] = job
            self.by_request[request.request_id] = job.name
        return job

    async def GetJob(self, request: Any, context: Any) -> Job:
        if request.name not in self.jobs:
            raise NotFoundError(f"no job {request.name}")
        return self.jobs[request.name]

    async def ListJobs(self, request: Any, context: Any) -> job_pb2.ListJobsResponse:
        start, size = int(request.page_token or 0), request.page_size or 2
        jobs = list(self.jobs.values())[::-1]
        token = str(start + size) if start + size < len(jobs) else ""
        return job_pb2.ListJobsResponse(jobs=jobs[start : start + size], next_page_token=token)

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[job_pb2.JobEvent]:
        self.watched_from.append(request.after_sequence)
        for sent, sequence in enumerate(range(request.after_sequence + 1, len(self.events) + 1)):
            if sent == self.break_after:
                raise UnavailableError("going away")
            event = job_pb2.JobEvent(sequence=sequence)
            event.MergeFrom(self.events[sequence - 1])
            yield event
        job = self.jobs[request.name]
        if self.endless:
            await self._cancelled.wait()
        if job.state == Job.STATE_QUEUED:
            job.state = Job.STATE_FAILED if self.error else Job.STATE_SUCCEEDED
            job.end_time.GetCurrentTime()
            if self.error:
                job.error.CopyFrom(to_status(self.error))

    async def CancelJob(self, request: Any, context: Any) -> Job:
        self.jobs[request.name].state = Job.STATE_CANCELLED
        self._cancelled.set()
        return self.jobs[request.name]

    async def ReplaceReward(self, request: Any, context: Any) -> Job:
        self.replaced = request
        return self.jobs[request.name]

    async def ScaleJob(self, request: Any, context: Any) -> Job:
        self.scaled = request.inference
        return self.jobs[request.name]

    async def ReadLogs(self, request: Any, context: Any) -> AsyncIterator[job_pb2.LogLine]:
        for text in ("one", "two"):
            yield job_pb2.LogLine(worker="trainer-0", text=text)

    async def DeleteJob(self, request: Any, context: Any) -> Any:
        del self.jobs[request.name]
        return Empty()


class FakeInference(inference_pb2_grpc.InferenceServiceServicer):
    """Says back what it was asked, word by word."""

    async def GetServedModel(self, request: Any, context: Any) -> inference_pb2.ServedModel:
        return inference_pb2.ServedModel(model="echo", policy_version=3)

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        text = request.text or " ".join(message.content for message in request.conversation.messages)
        for word in text.split():
            yield inference_pb2.StreamGenerateResponse(text=word + " ")
        yield inference_pb2.StreamGenerateResponse(finish_reason=common_pb2.FINISH_REASON_STOP)


@contextmanager
def serving_jobs(fake: FakeOrchestrator, **settings: Any) -> Iterator[str]:
    """Serves `fake` from a thread of its own, as another process would; yields the address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> RpcServer:
        server = RpcServer(ServiceSettings(**settings))
        server.add(job_pb2_grpc.add_JobServiceServicer_to_server, fake, "surogate.v1.JobService")
        add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
        server.add(add, FakeInference(), "surogate.v1.InferenceService")
        await server.start()
        return server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield server.address
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _step(number: int) -> job_pb2.JobEvent:
    return job_pb2.JobEvent(
        step_completed=job_pb2.StepCompleted(step=number, max_steps=5, metrics={"loss": 1 / number})
    )
