"""A session's worker from start to end. However it ends, everybody who waits for it gets one error that says why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from surogate.errors import CancelledError, InternalError, SurogateError
from surogate.internal.v1 import worker_pb2 as worker
from surogate.telemetry.log import get_logger
from trainer_svc.rank_plan import RankPlan
from trainer_svc.supervisor import ONE, WORKER_COMMAND, WorkerGroup, start_workers
from trainer_svc.worker_client import WorkerLostError, WorkerSilentError

_EXIT_SECONDS = 10.0
"""Given to a worker to end by itself once it has nothing more to do; then it is killed."""

_log = get_logger("trainer")


class WorkerLink:
    """Starts a worker, carries commands to it, watches over it, stops it."""

    def __init__(
        self,
        on_event: Callable[[worker.WorkerEvent], None],
        on_failure: Callable[[SurogateError], None],
        *,
        command: Sequence[str] = WORKER_COMMAND,
        ranks: RankPlan = ONE,
    ) -> None:
        self._on_event = on_event
        self._on_failure = on_failure
        self._command = command
        self._ranks = ranks
        self._worker: WorkerGroup | None = None
        self._watching: asyncio.Task[None] | None = None
        self._stopping = False
        self._starting = asyncio.Lock()
        self._ending = asyncio.Lock()
        self._end: SurogateError | None = None

    async def start(self) -> None:
        """Starts the process, unless it was stopped before."""
        async with self._starting:
            if self._stopping:
                raise _stopped()
            self._worker = await start_workers(self._on_event, command=self._command, ranks=self._ranks)
        self._watching = asyncio.create_task(self._watch(), name="worker watch")
        _log.info("worker started", worker_pid=self._worker.pid)

    async def ask(self, command: worker.WorkerCommand, *, silence: float) -> worker.WorkerReply:
        """Has a command carried out. Raises what the worker refused it with, or why the worker ended."""
        if self._worker is None or self._end is not None:
            raise self._end or _stopped()
        try:
            return await self._worker.client.request(command, silence=silence)
        except WorkerLostError:
            error = await self._finish(None, grace=_EXIT_SECONDS)
        except WorkerSilentError:
            name = command.WhichOneof("command")
            hung = InternalError(
                f"the training worker said nothing for {silence:g} s in {name}; it was killed. If it only needs "
                "longer, raise the trainer's load_timeout or step_timeout",
                reason="WORKER_HUNG",
            )
            error = await self._finish(hung, grace=0)
        raise error

    async def stop(self, *, save: bool, timeout: float) -> None:
        """Ends the worker within `timeout` seconds, with a checkpoint first if `save`; 0 kills it. May be repeated."""
        self._stopping = True
        async with self._starting:
            if self._worker is None or self._end is not None:
                return
        if timeout > 0:
            await self._ask_to_stop(save, timeout)
        await self._finish(_stopped(), grace=_EXIT_SECONDS if timeout > 0 else 0)

    async def _ask_to_stop(self, save: bool, timeout: float) -> None:
        assert self._worker is not None
        command = worker.WorkerCommand(stop=worker.StopCommand(save=save))
        try:
            await asyncio.wait_for(self._worker.client.request(command, silence=timeout), timeout)
        except (TimeoutError, WorkerSilentError):
            _log.warning("the worker did not stop in time and is killed", seconds=timeout, saving=save)
            await self._finish(_stopped(), grace=0)
        except WorkerLostError:
            if self._worker.client.fatal is not None:
                _log.error("the worker failed while it stopped", error=str(self._worker.client.fatal))

    async def _watch(self) -> None:
        assert self._worker is not None
        await self._worker.exited()
        await self._finish(None, grace=0)

    async def _finish(self, error: SurogateError | None, *, grace: float) -> SurogateError:
        """Sees the process to its end and settles, once, why it ended."""
        assert self._worker is not None
        async with self._ending:
            if self._end is not None:
                return self._end
            await self._worker.kill(grace)
            if self._stopping:
                self._end = _stopped()
            else:
                self._end = error or self._worker.cause()
                self._on_failure(self._end)
            return self._end


def _stopped() -> CancelledError:
    return CancelledError("the training session was stopped", reason="SESSION_STOPPED")
