"""A training session: its state, its worker, and what may be asked of it when."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from surogate.errors import FailedPreconditionError, InternalError, SurogateError
from surogate.internal.v1 import worker_pb2 as worker
from surogate.rpc.status import to_status
from surogate.telemetry import metrics
from surogate.telemetry.log import bind_process, get_logger
from surogate.v1 import trainer_pb2 as trainer
from trainer_svc import metrics as own
from trainer_svc.events import EventLog
from trainer_svc.pusher import Push, WeightPusher
from trainer_svc.samples import StepLimits, StepSamples
from trainer_svc.scratch import Scratch
from trainer_svc.session_config import SessionConfig
from trainer_svc.settings import TrainerSettings
from trainer_svc.steps import Metrics, StepSequence
from trainer_svc.supervisor import WORKER_COMMAND
from trainer_svc.worker_link import WorkerLink

State = trainer.Session.State
ENDED = (State.STATE_SUCCEEDED, State.STATE_FAILED, State.STATE_STOPPED)
_QUICK_STOP_SECONDS = 5.0
"""Given to a worker that has nothing to save."""

_BASE_IMAGE = ".tmp-base-image"
"""Folder in output_dir: named as what is half-written, so that the next session removes what a killed one leaves."""

T = TypeVar("T")
_log = get_logger("trainer")


@dataclass(frozen=True)
class Surroundings:
    """What a session needs of its process."""

    settings: TrainerSettings
    scratch: Scratch
    incarnation: str
    worker_command: Sequence[str] = WORKER_COMMAND
    push: Push | None = None
    """Stands in for `surogate.weights.push.push`."""


class TrainingSession:
    """One session. Methods that change something run to their end even if their caller leaves."""

    def __init__(self, request: trainer.CreateSessionRequest, config: SessionConfig, around: Surroundings) -> None:
        self.request = request
        """What it was created from."""
        self._config = config
        self._settings = around.settings
        self.events = EventLog()
        """What happened to it."""
        self._session = trainer.Session(
            session_id=request.session_id,
            state=State.STATE_LOADING,
            max_steps=max(config.max_steps, 0),
            incarnation=around.incarnation,
        )
        self._session.create_time.GetCurrentTime()
        self._steps = StepSequence(0)
        self._facts = worker.OpenReply()
        self._link = WorkerLink(self._on_event, self._on_failure, command=around.worker_command, ranks=config.ranks)
        self._session.base_id = _base_id(request) if config.own_base else ""
        self._pusher = WeightPusher(
            around.scratch,
            self._export,
            adapter_name=request.adapter_name,
            base_id=self._session.base_id,
            base_folder=Path(request.output_dir).expanduser() / _BASE_IMAGE,
            send=around.push,
        )
        self._turn = asyncio.Lock()
        """Held while the worker changes or reads its state, so that what was checked before still holds."""
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def id(self) -> str:
        """Its id."""
        return self._session.session_id

    @property
    def ended(self) -> bool:
        """Whether it has succeeded, failed or been stopped."""
        return self._session.state in ENDED

    def snapshot(self) -> trainer.Session:
        """The session as it is now."""
        now = trainer.Session()
        now.CopyFrom(self._session)
        return now

    def load(self) -> None:
        """Starts the worker and has it load the model, in the background."""
        bind_process(job=self.id)
        self._announce()
        self._spawn(self._load())

    def run(self) -> None:
        """Starts the loop of a PT or SFT session; does nothing if it runs or has succeeded already."""
        if self._config.kind == "grpo":
            raise FailedPreconditionError("a GRPO session is not started: it takes steps by TrainStep")
        if self._session.state in (State.STATE_RUNNING, State.STATE_SUCCEEDED):
            return
        self._require_ready()
        self._become(State.STATE_RUNNING)
        self._spawn(self._run())

    def accept_step(self, header: trainer.TrainStepHeader) -> StepLimits:
        """Refuses a step that cannot be trained now, before its samples are taken in; else says what it may bring."""
        self._require_grpo()
        self._steps.check(header.step)
        return StepLimits(
            max_samples=self._settings.max_step_samples,
            max_tokens=self._settings.max_step_tokens,
            vocab_size=self._facts.vocab_size,
            max_sequence_length=self._facts.max_sequence_length,
        )

    async def train_step(self, samples: StepSamples) -> trainer.TrainStepResponse:
        """Trains a step, or returns what it gave before."""
        self._require_grpo()
        values, repeated = await self._steps.train(samples, self._optimise)
        return trainer.TrainStepResponse(step=samples.step, metrics=values, repeated_call=repeated)

    async def push_weights(self, version: int, targets: Sequence[str]) -> trainer.PushWeightsResponse:
        """Gives the weights after step `version` to replicas."""
        self._require_grpo()
        response = await self._finish(self._pusher.push(version, targets))
        self._session.policy_version = self._pusher.committed
        bind_process(policy_version=self._pusher.committed)
        return response

    async def checkpoint(self, step: int, final: bool) -> trainer.TrainerCheckpoint:
        """Writes a checkpoint of the state after `step`, which must be the last one done."""
        self._require_grpo()
        return await self._finish(self._checkpoint(step, final))

    async def compute_logprobs(self, request: trainer.ComputeLogprobsRequest) -> trainer.ComputeLogprobsResponse:
        """Logprobs of tokens under the weights as they are when its turn comes."""
        self._require_grpo()
        command = worker.WorkerCommand(compute_logprobs=request)
        async with self._turn:
            return (await self._ask(command)).compute_logprobs

    async def stop(self) -> None:
        """Ends it: a running PT or SFT session writes a checkpoint first. Files stay."""
        if self.ended:
            return
        save = self._session.state == State.STATE_RUNNING
        idle_or_stepping = self._session.state == State.STATE_READY
        timeout = self._settings.stop_timeout if save else _QUICK_STOP_SECONDS if idle_or_stepping else 0
        await self._link.stop(save=save, timeout=timeout)
        if not self.ended:
            self._become(State.STATE_STOPPED)
        for task in self._tasks:
            task.cancel()
        self._pusher.close()
        metrics.forget(self.id)
        bind_process(job=None, step=None, policy_version=None)

    @property
    def token_limit(self) -> int:
        """Token ids are below it; 0 while not known."""
        return self._facts.vocab_size

    async def _load(self) -> None:
        await self._link.start()
        command = worker.WorkerCommand(open=worker.OpenCommand(session=self.request))
        reply = await self._link.ask(command, silence=self._settings.load_timeout)
        self._facts = reply.open
        self._steps = StepSequence(reply.open.step)
        self._session.step = reply.open.step
        self._session.max_steps = reply.open.max_steps or self._session.max_steps
        self._session.checkpoint = reply.open.checkpoint
        self._session.checkpoint_step = reply.open.checkpoint_step
        self._session.num_trainable_parameters = reply.open.num_trainable_parameters
        self._session.num_parameters = reply.open.num_parameters
        self._session.push_kind = reply.open.push_kind
        self._become(State.STATE_READY)

    async def _run(self) -> None:
        reply = await self._ask(worker.WorkerCommand(run=worker.RunCommand()))
        if not reply.run.stopped:
            self._become(State.STATE_SUCCEEDED)
            await self._link.stop(save=False, timeout=_QUICK_STOP_SECONDS)

    async def _optimise(self, samples: StepSamples) -> Metrics:
        command = worker.WorkerCommand(train_step=worker.TrainStepCommand(step=samples.step, samples=samples.samples))
        async with self._turn:
            reply = await self._ask(command)
        values = dict(reply.train_step.metrics)
        self._on_step(trainer.TrainerStep(step=samples.step, metrics=values))
        return values

    async def _export(self, version: int, folder: str) -> worker.ExportWeightsReply:
        command = worker.WorkerCommand(export_weights=worker.ExportWeightsCommand(version=version, directory=folder))
        async with self._turn:
            if version:  # the base is the same at every step
                self._require_step(version, "push")
            return (await self._ask(command)).export_weights

    async def _checkpoint(self, step: int, final: bool) -> trainer.TrainerCheckpoint:
        async with self._turn:
            self._require_step(step, "checkpoint")
            with own.CHECKPOINT_SECONDS.time():
                reply = await self._ask(worker.WorkerCommand(checkpoint=worker.CheckpointCommand(final=final)))
        self._on_checkpoint(reply.checkpoint)
        return reply.checkpoint

    async def _ask(self, command: worker.WorkerCommand) -> worker.WorkerReply:
        return await self._link.ask(command, silence=self._settings.step_timeout)

    def _require_grpo(self) -> None:
        if self._config.kind != "grpo":
            raise FailedPreconditionError(
                f"session {self.id} is of kind {self._config.kind}: it runs by itself (StartSession) and takes no steps"
            )
        self._require_ready()

    def _require_ready(self) -> None:
        if self._session.state == State.STATE_FAILED:
            raise FailedPreconditionError(
                f"session {self.id} has failed: {self._session.error.message}", reason="SESSION_FAILED"
            )
        if self._session.state != State.STATE_READY:
            name = State.Name(self._session.state).removeprefix("STATE_")
            raise FailedPreconditionError(f"session {self.id} is {name}, not READY", reason="SESSION_NOT_READY")

    def _require_step(self, step: int, what: str) -> None:
        if step != self._steps.done:
            raise FailedPreconditionError(
                f"cannot {what} the state after step {step}: {self._steps.done} steps are done",
                reason="WRONG_STEP",
                metadata={"step": str(self._steps.done)},
            )

    def _become(self, state: trainer.Session.State.ValueType) -> None:
        self._session.state = state
        self._announce()
        _log.info("session", state=State.Name(state).removeprefix("STATE_"))
        if self.ended:
            self.events.close()

    def _announce(self) -> None:
        self.events.add(trainer.SessionEvent(session=self._session))

    def _on_failure(self, error: SurogateError) -> None:
        if self.ended:
            return
        _log.error("session failed", error=str(error), reason=error.reason)
        self._session.error.CopyFrom(to_status(error))
        self._become(State.STATE_FAILED)

    def _on_event(self, event: worker.WorkerEvent) -> None:
        match event.WhichOneof("event"):
            case "step":
                self._on_step(event.step)
            case "checkpoint":
                self._on_checkpoint(event.checkpoint)
            case "evaluation":
                self.events.add(trainer.SessionEvent(evaluation=event.evaluation))
            case "warning":
                _log.warning(event.warning)
                self.events.add(trainer.SessionEvent(warning=event.warning))

    def _on_step(self, step: trainer.TrainerStep) -> None:
        self._session.step = step.step
        bind_process(step=step.step)
        metrics.publish(step.metrics, job=self.id, step=step.step)
        self.events.add(trainer.SessionEvent(step=step))

    def _on_checkpoint(self, checkpoint: trainer.TrainerCheckpoint) -> None:
        self._session.checkpoint = checkpoint.path
        self._session.checkpoint_step = checkpoint.step
        own.CHECKPOINT_STEP.set(checkpoint.step)
        self.events.add(trainer.SessionEvent(checkpoint=checkpoint))

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Sees work through though its caller may leave."""
        return await asyncio.shield(self._track(work))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._track(self._guarded(work))

    def _track(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._untrack)
        return task

    def _untrack(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller has it, or has left

    async def _guarded(self, work: Awaitable[None]) -> None:
        """Background work whose failure is the session's."""
        try:
            await work
        except SurogateError as error:
            self._on_failure(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the session must not seem to go on
            _log.exception("session failed unexpectedly")
            self._on_failure(InternalError(f"{type(error).__name__}: {error}"))


def _base_id(request: trainer.CreateSessionRequest) -> str:
    """The same for the same session in every incarnation of the trainer, and for no other."""
    digest = hashlib.sha256(request.config.SerializeToString(deterministic=True)).hexdigest()
    return f"{request.session_id}-{digest[:12]}"
