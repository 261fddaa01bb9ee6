"""Client for ordinary, blocking programs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

from surogate.client.aio import AsyncClient, JobRef
from surogate.client.generate import Prompt
from surogate.rpc.channel import ClientSecurity
from surogate.v1 import common_pb2, inference_pb2, job_pb2

T = TypeVar("T")

_END = object()


class Client:
    """Jobs of an orchestrator and, given the address of an inference service, text from its model.

    The blocking twin of `AsyncClient`: same methods, same errors. It may be used from several threads; close it, or use
    it in a `with` block.

        with Client("localhost:50051", ClientSecurity(token="...")) as client:
            job = client.create_job(job_config("grpo", train="train.yaml", infer="infer.yaml", orch="orch.yaml"))
            job = client.wait(job)
    """

    def __init__(self, target: str, security: ClientSecurity | None = None, *, timeout: float = 60.0) -> None:
        """See `AsyncClient`: `target` is HOST:PORT, `security` token and TLS, `timeout` seconds for each call."""
        self.target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="surogate-client", daemon=True)
        self._thread.start()
        self._closed = False
        try:
            self._client = self._run(_connect(target, security, timeout))
        except BaseException:
            self._stop_loop()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls in flight are cancelled. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._run(self._client.close())
        self._stop_loop()

    def create_job(
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
        return self._run(
            self._client.create_job(
                config, job_id=job_id, request_id=request_id, validate_only=validate_only, labels=labels
            )
        )

    def get_job(self, job: JobRef) -> job_pb2.Job:
        """Returns a job as it is now."""
        return self._run(self._client.get_job(job))

    def list_jobs(
        self,
        *,
        states: Iterable[job_pb2.Job.State.ValueType] = (),
        kinds: Iterable[job_pb2.Job.Kind.ValueType] = (),
        labels: Mapping[str, str] | None = None,
        page_size: int = 0,
    ) -> Iterator[job_pb2.Job]:
        """Yields the jobs that match, newest first, fetching page after page."""
        return self._iterate(self._client.list_jobs(states=states, kinds=kinds, labels=labels, page_size=page_size))

    def watch(self, job: JobRef, *, after_sequence: int = 0, patience: float = 60.0) -> Iterator[job_pb2.JobEvent]:
        """Yields a job's events with a sequence above `after_sequence`, stored ones first, until the job has ended.

        When the connection is lost it goes on after the last event that arrived: each event comes once. After
        `patience` seconds without reaching the server it raises UnavailableError.
        """
        return self._iterate(self._client.watch(job, after_sequence=after_sequence, patience=patience))

    def wait(self, job: JobRef, *, patience: float = 60.0) -> job_pb2.Job:
        """Waits until a job has ended and returns it; look at `state` and `error`."""
        return self._run(self._client.wait(job, patience=patience))

    def cancel_job(self, job: JobRef) -> job_pb2.Job:
        """Asks a job to stop. It saves what it can and ends CANCELLED; `wait` for that."""
        return self._run(self._client.cancel_job(job))

    def replace_reward(
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
        return self._run(
            self._client.replace_reward(
                job, address, environment=environment, tls=tls, token_env=token_env, shadow=shadow
            )
        )

    def scale_job(self, job: JobRef, *, inference: int) -> job_pb2.Job:
        """Has a running GRPO job use so many inference replicas from now on."""
        return self._run(self._client.scale_job(job, inference=inference))

    def logs(
        self, job: JobRef, *, component: str = "", tail_lines: int = 0, follow: bool = False
    ) -> Iterator[job_pb2.LogLine]:
        """Yields lines of the workers' logs: the last ones of each, and with `follow` what they write until they end.

        `component` is `inference` for all of them, `inference-1` for one, empty for every worker.
        """
        return self._iterate(self._client.logs(job, component=component, tail_lines=tail_lines, follow=follow))

    def delete_job(self, job: JobRef) -> None:
        """Forgets an ended job and its events; its files stay."""
        self._run(self._client.delete_job(job))

    def served_model(self) -> inference_pb2.ServedModel:
        """What the inference service at `target` serves."""
        return self._run(self._client.served_model())

    def stream(
        self, prompt: Prompt, sampling: common_pb2.SamplingParams | None = None
    ) -> Iterator[inference_pb2.StreamGenerateResponse]:
        """Generates with the model of the inference service at `target`; yields pieces as they are made.

        `prompt` is text, a list of messages (`{"role": "user", "content": "Hi"}`) for the model's chat template, or a
        list of token ids. The last piece has `finish_reason` set.
        """
        return self._iterate(self._client.stream(prompt, sampling))

    def generate(self, prompt: Prompt, sampling: common_pb2.SamplingParams | None = None) -> str:
        """Like `stream`; returns the whole text."""
        return self._run(self._client.generate(prompt, sampling))

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def _iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        async def following() -> Any:
            return await anext(items, _END)

        try:
            while (item := self._run(following())) is not _END:
                yield item
        finally:
            close = getattr(items, "aclose", None)
            if close is not None and not self._closed:
                self._run(close())

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _connect(target: str, security: ClientSecurity | None, timeout: float) -> AsyncClient:
    # The channel belongs to the loop in which it is made.
    return AsyncClient(target, security, timeout=timeout)
