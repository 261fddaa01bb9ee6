"""The inference replicas: which one takes the next request, which ones are away, and giving them new weights.

A replica that fails, restarts or serves old weights gets no traffic until it has been given the trainer's current ones.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

from orchestrator_svc.grpo.fatal import ReplicasLostError
from orchestrator_svc.grpo.stalls import Stalls
from orchestrator_svc.launchers.base import READY_TIMEOUT, Worker, WorkerFailedError
from surogate.errors import FailedPreconditionError, InternalError, SurogateError, UnavailableError, UnimplementedError
from surogate.rpc.status import from_status
from surogate.telemetry.log import get_logger
from surogate.v1 import inference_pb2, inference_pb2_grpc, trainer_pb2, weights_pb2, weights_pb2_grpc

if TYPE_CHECKING:
    import grpc.aio

PUSH_ATTEMPTS = 5
"""Times that a push to a replica is tried before the failure is final."""

PUSH_PAUSE = 0.2
"""Seconds before the second attempt; doubles."""

OTHER_BASE = "OTHER_BASE"
"""Reason of a replica that refuses an adapter, as it lacks the base that the adapter fits: it has restarted."""

QUEUE_FACTOR = 2
"""Rollouts given to a replica at once, as a multiple of the sequences that it generates at once."""

_SOME_REPLICA = "an inference replica"

Stub: TypeAlias = "inference_pb2_grpc.InferenceServiceAsyncStub"
Updates: TypeAlias = "weights_pb2_grpc.WeightUpdateServiceAsyncStub"
_log = get_logger("orchestrator")


class Source(Protocol):
    """Where weights come from: `orchestrator_svc.grpo.trainer.Trainer`."""

    step: int
    """Steps done: the version that a replica must serve before it gets traffic."""
    base_id: str
    """The base that a replica must have under the adapters; empty for the model as it was loaded."""

    async def push(self, targets: Sequence[str]) -> trainer_pb2.PushWeightsResponse:
        """Gives the current version to replicas."""
        ...

    async def push_base(self, targets: Sequence[str]) -> trainer_pb2.PushWeightsResponse:
        """Gives the base to replicas that serve version 0."""
        ...


class PushFailedError(InternalError):
    """No replica took the new weights, after several attempts."""

    reason = "PUSH_FAILED"


@dataclass(eq=False)
class Replica:
    """One inference worker."""

    worker: Worker
    stub: Stub | None = None
    """Calls of the current incarnation; None while it may get no traffic."""
    capacity: int = 1 << 30
    """Rollouts that it is given at once."""
    outstanding: int = 0
    """Rollouts that it has now."""
    failure: SurogateError | None = None
    """Why it will not come back; None while it may."""
    model: inference_pb2.ServedModel = field(default_factory=inference_pb2.ServedModel)


@dataclass(frozen=True)
class Pushed:
    """Outcome of a push to all replicas."""

    version: int
    num_bytes: int
    seconds: float
    """From the first upload to the last commit."""
    pause_seconds: float
    num_replicas: int
    """Replicas that serve the version."""


class Replicas:
    """Balances requests over the replicas that serve, and brings the others back in the background."""

    def __init__(self, workers: Sequence[Worker], source: Source, stalls: Stalls | None = None) -> None:
        self._stalls = stalls or Stalls()
        self.all = [Replica(worker) for worker in workers]
        self._source = source
        self._changed = asyncio.Condition()
        self._pushing = asyncio.Lock()
        self._restoring: dict[Replica, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Waits until every replica serves the trainer's version."""
        await asyncio.gather(*(self._restore(replica) for replica in self.all))

    @asynccontextmanager
    async def lease(self, rollouts: int) -> AsyncIterator[Replica]:
        """The replica with the least to do, for a request of `rollouts` completions. Waits while all are full or away.

        Raises:
            ReplicasLostError: None of them will come back.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._free(rollouts) is not None or self._lost())
            replica = self._free(rollouts)
            if replica is None:
                raise self._loss()
            replica.outstanding += rollouts
        try:
            yield replica
        finally:
            replica.outstanding -= rollouts
            await self._notify()

    def add(self, worker: Worker) -> None:
        """Has one more replica take part, once it is up and serves the trainer's version."""
        replica = Replica(worker)
        self.all.append(replica)
        self._start_restore(replica)

    async def drain_last(self) -> Worker:
        """Takes the last replica out of service, and returns its worker when it has finished what it was given."""
        replica = self.all.pop()
        if (restoring := self._restoring.pop(replica, None)) is not None:
            restoring.cancel()
        async with self._pushing:  # a push under way has it among its targets
            replica.stub = None
        async with self._changed:
            self._changed.notify_all()
            await self._changed.wait_for(lambda: not replica.outstanding)
        return replica.worker

    def doubt(self, replica: Replica, stub: Stub | None) -> None:
        """Takes a replica out of service until it has been brought back, unless `stub` is of an earlier incarnation."""
        if replica.stub is None or replica.stub is not stub:
            return
        replica.stub = None
        if replica not in self.all:
            return  # it is leaving
        self._start_restore(replica)

    async def push(self) -> Pushed:
        """Gives the trainer's version to all replicas that serve; those that do not take it are brought back later.

        Raises:
            PushFailedError: None took it. The old weights go on serving.
        """
        started = time.perf_counter()
        response, taken = await self._push_until_taken()
        return Pushed(
            version=self._source.step,
            num_bytes=response.num_bytes,
            seconds=response.seconds or time.perf_counter() - started,
            pause_seconds=response.pause_seconds,
            num_replicas=taken,
        )

    async def close(self) -> None:
        """Stops what runs in the background."""
        tasks = list(self._restoring.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _push_until_taken(self) -> tuple[trainer_pb2.PushWeightsResponse, int]:
        problem = "no replica is up"
        for attempt in range(PUSH_ATTEMPTS):
            await asyncio.sleep(PUSH_PAUSE * 2**attempt if attempt else 0)
            serving, response, problems = await self._push_once()
            if len(problems) < len(serving):
                return response, len(serving) - len(problems)
            problem = "; ".join(problems)
            _log.warning("no replica took the weights", attempt=attempt + 1, problem=problem)
        raise PushFailedError(f"no inference replica took policy version {self._source.step}: {problem}")

    async def _push_once(self) -> tuple[list[Replica], trainer_pb2.PushWeightsResponse, list[str]]:
        """Pushes to the replicas that are up, once there is one: those, the answer, and what went wrong."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: bool(self._up()) or self._lost())
            if self._lost():
                raise self._loss()
            async with self._pushing:  # not before: a replica that comes back needs it for its own push
                for replica in self._up():
                    if not replica.worker.address:
                        self.doubt(replica, replica.stub)
                serving = self._up()
                if serving:
                    response = await self._source.push([replica.worker.address for replica in serving])
                    return serving, response, await self._settle(serving, response)

    async def _settle(self, targets: Sequence[Replica], response: trainer_pb2.PushWeightsResponse) -> list[str]:
        """Notes each replica's outcome; returns what went wrong. Those replicas are brought back in the background."""
        failed: dict[Replica, SurogateError] = {}
        for replica, outcome in zip(targets, response.replicas, strict=True):
            if outcome.HasField("error") and not await _serves(replica, self._source.step):
                failed[replica] = from_status(outcome.error)
            else:
                replica.worker.policy_version = self._source.step
        for replica, error in failed.items():
            # One that is away, or has restarted since, comes back with the weights. Where none took them, the others
            # are simply tried again.
            if len(failed) < len(targets) or isinstance(error, UnavailableError) or error.reason == OTHER_BASE:
                self.doubt(replica, replica.stub)
        return [f"{replica.worker.name}: {error}" for replica, error in failed.items()]

    def _start_restore(self, replica: Replica) -> None:
        task = asyncio.create_task(self._restore_or_fail(replica), name=f"restore {replica.worker.name}")
        self._restoring[replica] = task
        task.add_done_callback(lambda _: self._restoring.pop(replica, None))

    async def _restore_or_fail(self, replica: Replica) -> None:
        try:
            if not self._up():
                await self._stalls.begin(_SOME_REPLICA, f"{replica.worker.name} has to come back with the weights")
            await self._restore(replica)
            await self._stalls.end(_SOME_REPLICA)
        except SurogateError as error:
            _log.error("replica is lost", replica=replica.worker.name, error=str(error))
            replica.failure = error
            await self._notify()

    async def _restore(self, replica: Replica) -> None:
        """Waits until a replica is up, gives it the trainer's version, and lets it have traffic."""
        for attempt in range(PUSH_ATTEMPTS):
            await asyncio.sleep(PUSH_PAUSE * 2**attempt if attempt else 0)
            try:
                await self._try_restore(replica)
                return
            except WorkerFailedError:
                raise
            except SurogateError as error:
                _log.warning("replica is not back yet", replica=replica.worker.name, error=str(error))
                if attempt == PUSH_ATTEMPTS - 1:
                    raise

    async def _try_restore(self, replica: Replica) -> None:
        await replica.worker.ready(READY_TIMEOUT)
        stub: Stub = inference_pb2_grpc.InferenceServiceStub(await replica.worker.channel())
        async with self._pushing:
            model = await stub.GetServedModel(inference_pb2.GetServedModelRequest())
            if model.policy_version > self._source.step:
                raise FailedPreconditionError(
                    f"{replica.worker.name} serves policy version {model.policy_version}, this job is at "
                    f"{self._source.step}: restart the replica, it was used by another job",
                    reason="REPLICA_AHEAD",
                )
            if model.base_id != self._source.base_id:
                await self._give_base(replica, model)
            version = model.policy_version
            if version < self._source.step:
                response = await self._source.push([replica.worker.address])
                _raise_error(response)
                version = response.version
            # Perhaps a step was trained meanwhile: its push comes next, to this replica too.
            await _confirm(await replica.worker.channel(), version)
            replica.worker.policy_version = version
            replica.model = model
            replica.capacity = QUEUE_FACTOR * model.max_num_seqs or replica.capacity
            replica.stub = stub
        await self._notify()

    async def _give_base(self, replica: Replica, model: inference_pb2.ServedModel) -> None:
        """Gives a replica the base that the trainer's adapters are added to."""
        if model.policy_version or not self._source.base_id:
            raise FailedPreconditionError(
                f"{replica.worker.name} has been given the base {model.base_id or 'of another job'}, which is not this "
                "job's: restart the replica",
                reason="REPLICA_HAS_OTHER_BASE",
            )
        _raise_error(await self._source.push_base([replica.worker.address]))

    def _up(self) -> list[Replica]:
        return [replica for replica in self.all if replica.stub is not None]

    def _free(self, rollouts: int) -> Replica | None:
        fitting = [r for r in self._up() if not r.outstanding or r.outstanding + rollouts <= r.capacity]
        return min(fitting, key=lambda replica: replica.outstanding, default=None)

    def _lost(self) -> bool:
        """Whether no replica is up, and none will come back."""
        return all(replica.failure is not None for replica in self.all)

    def _loss(self) -> ReplicasLostError:
        reasons = "; ".join(f"{replica.worker.name}: {replica.failure}" for replica in self.all)
        return ReplicasLostError(f"no inference replica is left: {reasons}")

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


async def _confirm(channel: grpc.aio.Channel, version: int) -> None:
    """Tells a replica that it serves what it is to serve, for those who look at its health."""
    stub: Updates = weights_pb2_grpc.WeightUpdateServiceStub(channel)
    with suppress(UnimplementedError):  # a replica of before
        await stub.ConfirmWeights(weights_pb2.ConfirmWeightsRequest(version=version))


def _raise_error(response: trainer_pb2.PushWeightsResponse) -> None:
    """Raises what went wrong at the only target of a push."""
    if response.replicas[0].HasField("error"):
        raise from_status(response.replicas[0].error)


async def _serves(replica: Replica, version: int) -> bool:
    """Whether a replica that refused a version has it already: an earlier push of the same one was cut off."""
    if replica.stub is None:
        return False
    try:
        model = await replica.stub.GetServedModel(inference_pb2.GetServedModelRequest())
    except SurogateError:
        return False
    return model.policy_version == version
