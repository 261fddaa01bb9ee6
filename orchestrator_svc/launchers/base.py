"""What a launcher gives a job: workers that can be called, and called again after a restart.

A `Launcher` opens one `WorkerPool` per job. The runner starts workers in it (for every kind of job by
`orchestrator_svc.jobs.workers.start_workers`) and talks to them through `Worker.channel()`. When a call fails since a
worker went away:

    channel = await worker.channel()
    try:
        ...
    except UnavailableError:
        await worker.ready(timeout)       # waits for the next incarnation; WorkerFailedError when there is none
        channel = await worker.channel()  # a new channel, perhaps to another address

`Worker.generation` tells whether it is a new incarnation, which has lost its memory: a trainer must be given its
session again, an inference replica serves policy version 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from surogate.errors import FailedPreconditionError, InternalError

if TYPE_CHECKING:
    import grpc.aio

    from surogate.config.job import AnyJob
    from surogate.rpc.channel import ClientSecurity

Component = Literal["trainer", "inference", "reward"]

HEALTH_SERVICE: Mapping[Component, str] = {
    "trainer": "surogate.v1.TrainerService",
    "inference": "surogate.v1.WeightUpdateService",
    "reward": "surogate.v1.RewardService",
}
"""Name under which each component answers health checks: SERVING means that it can be called. An inference replica can
be given weights then; whether it has those of now is for the orchestrator to see to."""

Run: TypeAlias = tuple[str, str]
"""A job by its id and its uid, which tells it from an earlier one of the same id."""

Known = Callable[[Collection[str]], Awaitable[Mapping[Run, bool]]]
"""The jobs of these ids that the store knows, and whether each has ended. Of others it knows nothing."""

READY_TIMEOUT = 900.0
"""Seconds to wait for a worker to be ready, loading of a large model included."""


class WorkerFailedError(InternalError):
    """A worker ended, or stayed away, for good. The message ends with its last log lines. Not worth a retry."""

    reason = "WORKER_FAILED"


@dataclass(frozen=True)
class WorkerSpec:
    """One worker to start."""

    component: Component
    index: int = 0
    """Position among the workers of the component, from 0."""
    config: Mapping[str, Any] | None = None
    """Configuration of the service itself (inference: the resolved infer.yaml), given to it as a file. Static workers
    have been configured by whoever started them."""
    host: str = "127.0.0.1"
    """Address to listen on (local launcher)."""
    port: int = 0
    """Port to listen on; 0 takes a free one (local launcher)."""
    port_key: str = ""
    """YAML key that asked for the port, named when the port is taken."""
    image: str = ""
    """Image to run in place of the usual one (Kubernetes launcher, reward services of a job's own)."""


class Worker(ABC):
    """One worker service of a job, through all its incarnations."""

    def __init__(self, component: Component, index: int) -> None:
        self.component: Component = component
        self.index = index
        self.policy_version = 0
        """Version that it serves (inference), for people: the GRPO loop sets it after each push."""
        self.status_message = ""
        """What it is doing, for people."""

    @property
    def name(self) -> str:
        """`inference-0`."""
        return f"{self.component}-{self.index}"

    @property
    @abstractmethod
    def address(self) -> str:
        """gRPC address of the current incarnation, `host:port`; empty while none is up. May change with a restart."""

    @property
    @abstractmethod
    def security(self) -> ClientSecurity:
        """Token and certificates to call it with. All the workers of a pool share them."""

    @property
    @abstractmethod
    def generation(self) -> int:
        """Number of the current incarnation: 1 for the first, one more whenever a new one has come up."""

    @property
    @abstractmethod
    def restarts(self) -> int:
        """Number of times it was started again in this job."""

    @abstractmethod
    async def channel(self) -> grpc.aio.Channel:
        """Channel to the current incarnation: the same one until a restart. The pool closes it.

        Raises:
            UnavailableError: No incarnation is up; await `ready` and call again.
        """

    @abstractmethod
    async def ready(self, timeout: float = READY_TIMEOUT) -> int:
        """Waits until the worker answers SERVING, over restarts if need be, and returns its generation.

        Raises:
            WorkerFailedError: It ended and will not be started again, or a static one stayed away too long.
            DeadlineError: Not ready after `timeout` seconds, in which it had room to run in.
        """

    async def log(self, tail: int, follow: bool) -> AsyncIterator[str]:
        """The last lines of its log, and with `follow` new ones until it ends for good.

        Raises:
            FailedPreconditionError: Its log is kept by whoever runs it.
        """
        raise FailedPreconditionError(f"{self.name} is run by somebody else, who has its log", reason="NO_LOG")
        yield ""  # makes it a generator


class WorkerPool(ABC):
    """The workers of one job."""

    ends_workers: bool = True
    """Whether `stop` ends the worker processes; others go on with what they do, and can be found again."""

    @property
    @abstractmethod
    def workers(self) -> Sequence[Worker]:
        """Workers that were started, in the order of the calls."""

    @abstractmethod
    def count(self, component: Component, wanted: int) -> int:
        """Number of workers of a component that the job gets when it asks for `wanted`: a static pool has what it has.

        Raises:
            FailedPreconditionError: The pool has none of that component.
        """

    @abstractmethod
    async def start(self, spec: WorkerSpec) -> Worker:
        """Starts a worker and returns at once; `Worker.ready` waits for it.

        Raises:
            FailedPreconditionError: It cannot be started as asked, for example since the port is taken.
        """

    async def remove(self, worker: Worker) -> None:
        """Ends one worker in good order.

        Raises:
            FailedPreconditionError: Its workers are run by somebody else.
        """
        raise FailedPreconditionError(f"{worker.name} is run by somebody else", reason="STATIC_REPLICAS")

    @abstractmethod
    async def stop(self) -> None:
        """Stops every worker in good order and closes the channels. Idempotent. Static workers are left running."""

    async def release(self) -> None:
        """Lets go of the workers when the orchestrator ends and the job does not: those that can be found again go on,
        the others are stopped."""
        await self.stop()


class Job(Protocol):
    """What a launcher needs to know of a job; see `orchestrator_svc.jobs.context.JobContext`."""

    @property
    def job_id(self) -> str:
        """Its id."""

    @property
    def uid(self) -> str:
        """Tells it from an earlier job of the same id."""

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels that its author gave it."""

    @property
    def config(self) -> AnyJob:
        """The resolved configuration."""

    @property
    def output_dir(self) -> Path:
        """Absolute folder of the job; exists."""

    async def notice(self, text: str, *, component: str = ...) -> None:
        """Tells something that a person should read."""

    async def has_ended(self, uid: str) -> bool:
        """Whether an earlier job of the same id is known by that uid, and to have ended or been deleted."""
        ...

    async def recent_restarts(self, worker: str, since: float) -> Sequence[float]:
        """When a worker was started again after `since`, in seconds since the epoch."""
        ...

    async def add_restart(self, worker: str, when: float, since: float) -> None:
        """Writes down that a worker is started again; what was before `since` may be forgotten."""


class Launcher(ABC):
    """A way of giving workers to jobs."""

    async def prepare(self) -> None:  # noqa: B027 - most need nothing
        """Makes sure that workers can be started, as far as that can be known. Raises ConfigError."""

    @abstractmethod
    async def open(self, job: Job) -> WorkerPool:
        """Opens the pool of a job. Nothing is started yet."""

    @abstractmethod
    async def reap(self, job_id: str, uid: str) -> None:
        """Frees what that job may have left behind, where that can outlive the orchestrator. Best effort."""

    async def sweep(self, known: Known) -> None:  # noqa: B027 - most have nothing to do
        """Frees what jobs that are known to have ended have left behind."""

    async def close(self) -> None:  # noqa: B027 - most hold nothing
        """Lets go of what the launcher itself holds, after the pools were released."""
