"""Client for asyncio programs."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any

from surogate.client.generate import Prompt, generate_request
from surogate.client.jobs import ENDED, job_name
from surogate.errors import UnavailableError
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.structs import to_struct
from surogate.v1 import common_pb2, inference_pb2, inference_pb2_grpc, job_pb2, job_pb2_grpc

JobRef = str | job_pb2.Job
"""A job: its id, its resource name `jobs/{id}`, or the message."""

_JOBS = "surogate.v1.JobService"
# Safe to repeat: CreateJob carries a request_id, the others change nothing or ask for the same end.
_IDEMPOTENT = (
    *(f"{_JOBS}/{method}" for method in ("CreateJob", "GetJob", "ListJobs", "CancelJob")),
    "surogate.v1.InferenceService/GetServedModel",
)
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0


class AsyncClient:
    """Jobs of an orchestrator and, given the address of an inference service, text from its model.

    Every method raises `surogate.errors.SurogateError`s: InvalidInputError with violations that name the YAML key,
    NotFoundError, UnavailableError when the server cannot be reached, DeadlineError after `timeout` seconds.

        async with AsyncClient("localhost:50051") as client:
            job = await client.create_job(job_config("pt", train="pt.yaml"))
            job = await client.wait(job)
    """

    def __init__(self, target: str, security: ClientSecurity | None = None, *, timeout: float = 60.0) -> None:
        """Connects to `target` (HOST:PORT) when the first call is made.

        `security` is token and TLS; unset it comes from SUROGATE_TOKEN, SUROGATE_TLS_CA and their like. `timeout` is
        the deadline of each call in seconds, streams excepted.
        """
        self.target = target
        self._channel = open_channel(target, security, idempotent=_IDEMPOTENT, default_deadline=timeout)
        self._jobs = job_pb2_grpc.JobServiceStub(self._channel)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; calls in flight are cancelled."""
        await self._channel.close(None)

    async def create_job(
        self,
        config: Mapping[str, Any],
        *,
        job_id: str = "",
        request_id: str | None = None,
        validate_only: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> job_pb2.Job:
        """Creates a job from a configuration (see `job_config`) and returns it, queued.

        A repeat with the same `request_id` returns the job that the first call made; without one a random id makes
        retries safe. `validate_only` only checks: the answer holds the resolved configuration and the warnings.
        """
        request = job_pb2.CreateJobRequest(
            config=to_struct(config),
            job_id=job_id,
            request_id=uuid.uuid4().hex if request_id is None else request_id,
            validate_only=validate_only,
            labels=dict(labels or {}),
        )
        return await self._jobs.CreateJob(request)

    async def get_job(self, job: JobRef) -> job_pb2.Job:
        """Returns a job as it is now."""
        return await self._jobs.GetJob(job_pb2.GetJobRequest(name=job_name(job)))

    async def list_jobs(
        self,
        *,
        states: Iterable[job_pb2.Job.State.ValueType] = (),
        kinds: Iterable[job_pb2.Job.Kind.ValueType] = (),
        labels: Mapping[str, str] | None = None,
        page_size: int = 0,
    ) -> AsyncIterator[job_pb2.Job]:
        """Yields the jobs that match, newest first, fetching page after page."""
        request = job_pb2.ListJobsRequest(
            page_size=page_size, states=list(states), kinds=list(kinds), labels=dict(labels or {})
        )
        while True:
            page = await self._jobs.ListJobs(request)
            for job in page.jobs:
                yield job
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def watch(
        self, job: JobRef, *, after_sequence: int = 0, patience: float = 60.0
    ) -> AsyncIterator[job_pb2.JobEvent]:
        """Yields a job's events with a sequence above `after_sequence`, stored ones first, until the job has ended.

        When the connection is lost it goes on after the last event that arrived: each event comes once. After
        `patience` seconds without reaching the server it raises UnavailableError.
        """
        name = job_name(job)
        pause, reached = _FIRST_PAUSE, time.monotonic()
        while True:
            try:
                request = job_pb2.WatchJobRequest(name=name, after_sequence=after_sequence)
                async for event in self._jobs.WatchJob(request):
                    after_sequence = event.sequence
                    pause, reached = _FIRST_PAUSE, time.monotonic()
                    yield event
                    reached = time.monotonic()
                if (await self.get_job(name)).state in ENDED:
                    return
            except UnavailableError:
                if time.monotonic() - reached > patience:
                    raise
            # A server that goes away ends its streams, in good order or not.
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def wait(self, job: JobRef, *, patience: float = 60.0) -> job_pb2.Job:
        """Waits until a job has ended and returns it; look at `state` and `error`."""
        async for _ in self.watch(job, patience=patience):
            pass
        return await self.get_job(job)

    async def cancel_job(self, job: JobRef) -> job_pb2.Job:
        """Asks a job to stop. It saves what it can and ends CANCELLED; `wait` for that."""
        return await self._jobs.CancelJob(job_pb2.CancelJobRequest(name=job_name(job)))

    async def replace_reward(
        self,
        job: JobRef,
        address: str,
        *,
        environment: str = "",
        tls: bool = False,
        token_env: str = "",
        shadow: bool = False,
    ) -> job_pb2.Job:
        """Has the reward service at `address` (HOST:PORT) score an environment of a running GRPO job from now on.

        `environment` may be left out where the job has only one. With `shadow` it scores beside the one that counts,
        and the job's metrics say how far they agree (`shadow/…`). An empty address goes back to the configured
        service, or ends the shadow. `token_env` names a variable of the orchestrator's environment.
        """
        return await self._jobs.ReplaceReward(
            job_pb2.ReplaceRewardRequest(
                name=job_name(job),
                environment=environment,
                address=address,
                tls=tls,
                token_env=token_env,
                shadow=shadow,
            )
        )

    async def scale_job(self, job: JobRef, *, inference: int) -> job_pb2.Job:
        """Has a running GRPO job use so many inference replicas from now on."""
        return await self._jobs.ScaleJob(job_pb2.ScaleJobRequest(name=job_name(job), inference=inference))

    async def logs(
        self, job: JobRef, *, component: str = "", tail_lines: int = 0, follow: bool = False
    ) -> AsyncIterator[job_pb2.LogLine]:
        """Yields lines of the workers' logs: the last ones of each, and with `follow` what they write until they end.

        `component` is `inference` for all of them, `inference-1` for one, empty for every worker.
        """
        request = job_pb2.ReadLogsRequest(name=job_name(job), component=component, tail_lines=tail_lines, follow=follow)
        async for line in self._jobs.ReadLogs(request):
            yield line

    async def delete_job(self, job: JobRef) -> None:
        """Forgets an ended job and its events; its files stay."""
        await self._jobs.DeleteJob(job_pb2.DeleteJobRequest(name=job_name(job)))

    async def served_model(self) -> inference_pb2.ServedModel:
        """What the inference service at `target` serves."""
        return await self._inference.GetServedModel(inference_pb2.GetServedModelRequest())

    async def stream(
        self, prompt: Prompt, sampling: common_pb2.SamplingParams | None = None
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        """Generates with the model of the inference service at `target`; yields pieces as they are made.

        `prompt` is text, a list of messages (`{"role": "user", "content": "Hi"}`) for the model's chat template, or a
        list of token ids. The last piece has `finish_reason` set.
        """
        async for piece in self._inference.StreamGenerate(generate_request(prompt, sampling)):
            yield piece

    async def generate(self, prompt: Prompt, sampling: common_pb2.SamplingParams | None = None) -> str:
        """Like `stream`; returns the whole text."""
        return "".join([piece.text async for piece in self.stream(prompt, sampling)])
