"""What a trainer's front and its worker say to each other, and the worker's end of it. Torch-free.

The front passes one end of a socket pair to the worker of rank 0 (`python -m trainer_svc.worker --fd N`). Messages are
those of proto/surogate/internal/v1/worker.proto, each after its length. The worker carries commands out in its main
thread, one after the other; a reader thread takes them in meanwhile, so that a stop is seen between optimiser steps.

The worker's main is no more than

    server = WorkerServer(args.fd)
    sys.exit(server.serve(Engine(reporter=server)))
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

from surogate.errors import DataLossError, InternalError, SurogateError
from surogate.internal.v1 import worker_pb2 as worker
from surogate.rpc.status import to_status
from surogate.v1 import trainer_pb2 as trainer

HEADER = struct.Struct(">I")
"""Length of the message that follows, in bytes."""

MAX_MESSAGE_BYTES = 1 << 30
"""No message is longer than this; the front bounds a step's samples well below it."""

MAX_PENDING_COMMANDS = 64
"""Commands that wait in the worker. The front sends one at a time, and a stop."""

EXIT_FRONT_GONE = 3
"""Exit code of a worker whose front went away without a stop."""

PEER_LOST = "PEER_LOST"
"""Reason of the error of a rank 0 that cannot go on because another rank is gone."""

EXIT_PEER_LOST = 4
"""Exit code of a rank that cannot go on because another one is gone: that one's end says why."""

_log = logging.getLogger("trainer.worker")


class Handler(Protocol):
    """What a worker can do: the engine implements it. All methods are called in the main thread, one at a time.

    A `SurogateError` is reported to the caller and must leave the state as it was; `InternalError`, `DataLossError`
    and any other exception mean that the state cannot be trusted any more: the session fails and the worker ends.
    """

    def open(self, session: trainer.CreateSessionRequest) -> worker.OpenReply:
        """Loads the model, or resumes it from `session.resume_from` or the newest checkpoint. Any error is fatal."""
        ...

    def run(self) -> worker.RunReply:
        """Trains to the end (PT, SFT), reporting every step, and writes the final model. Any error is fatal.

        Looks at `Reporter.stop_requested` between optimiser steps and, when it is set, returns `stopped=True` without
        saving: `stop` follows and says whether to.
        """
        ...

    def train_step(self, step: int, samples: Sequence[trainer.TrainingSample]) -> Mapping[str, float]:
        """Trains GRPO step `step` (steps done plus one) on `samples` (sorted by id) and returns its metrics.

        Refuses, before anything has changed, samples it cannot train on with an `InvalidInputError`.
        """
        ...

    def export_weights(self, version: int, directory: str) -> worker.ExportWeightsReply:
        """Writes the weights, of the kind that `open` told, as a safetensors image into `directory`; for version 0 the
        base under the adapter."""
        ...

    def checkpoint(self, final: bool) -> trainer.TrainerCheckpoint:
        """Writes a checkpoint of the state after the last step; with `final` the final model too. Not an event."""
        ...

    def compute_logprobs(self, request: trainer.ComputeLogprobsRequest) -> trainer.ComputeLogprobsResponse:
        """Logprobs of given tokens under the current weights, at `request.temperature` (unset: 1)."""
        ...

    def stop(self, save: bool) -> None:
        """Writes a checkpoint if `save` and there is none of this step yet (an event tells). Then the process ends."""
        ...


class Reporter(Protocol):
    """How a handler tells the front what happens on the way. Methods may be called from any thread."""

    @property
    def stop_requested(self) -> bool:
        """Whether the front has asked to stop: return from the loop after the optimiser step in hand."""
        ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` of a run was done. Call it for every step: the front takes long silence for a hang."""
        ...

    def checkpoint(self, step: int, path: str, *, final: bool = False) -> None:
        """A checkpoint that the worker itself decided on is complete."""
        ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out data was evaluated after step `step`."""
        ...

    def warning(self, text: str) -> None:
        """Something that a person should read."""
        ...


class Fellows(Protocol):
    """The other ranks, as rank 0 sees them."""

    def announce(self, command: bytes) -> None:
        """Passes a command on."""
        ...

    def lost(self, error: BaseException) -> bool:
        """Whether an error says no more than that one of them is gone."""
        ...


class WorkerServer:
    """The worker's end of the connection; a `Reporter`."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._stream = self._socket.makefile("rb")
        self._commands: queue.Queue[worker.WorkerCommand] = queue.Queue(MAX_PENDING_COMMANDS)
        self._send_lock = threading.Lock()
        self._stop = threading.Event()
        self._done = threading.Event()
        self._exports: set[str] = set()
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def serve(self, handler: Handler, fellows: Fellows | None = None) -> int:
        """Carries commands out until a stop was answered (returns 0) or a fatal error was reported (returns 1).

        Each is passed on to the `fellows` first: other ranks that carry it out too.

        When the front goes away the process exits at once with `EXIT_FRONT_GONE`: nobody could use its work, and the
        last complete checkpoint is good.
        """
        while True:
            command = self._commands.get()
            reply = self._carry_out(handler, command, fellows)
            last = reply.fatal or command.WhichOneof("command") == "stop"
            if last:
                self._done.set()
            self._send(worker.WorkerMessage(reply=reply))
            if last:
                return int(reply.fatal)

    @property
    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._report(worker.WorkerEvent(step=trainer.TrainerStep(step=step, metrics=metrics)))

    def checkpoint(self, step: int, path: str, *, final: bool = False) -> None:
        self._report(worker.WorkerEvent(checkpoint=trainer.TrainerCheckpoint(step=step, path=path, final=final)))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._report(worker.WorkerEvent(evaluation=trainer.TrainerEvaluation(step=step, metrics=metrics)))

    def warning(self, text: str) -> None:
        self._report(worker.WorkerEvent(warning=text))

    def _carry_out(
        self, handler: Handler, command: worker.WorkerCommand, fellows: Fellows | None
    ) -> worker.WorkerReply:
        reply = worker.WorkerReply(id=command.id)
        name = command.WhichOneof("command")
        try:
            if fellows is not None:
                fellows.announce(command.SerializeToString())
            self._call(handler, command, reply)
        except SurogateError as error:
            reply.error.CopyFrom(to_status(error))
            reply.fatal = name in ("open", "run", "stop") or isinstance(error, InternalError | DataLossError)
            if reply.fatal:
                _log.error("%s failed: %s", name, error, exc_info=isinstance(error, InternalError))
        except Exception as error:  # noqa: BLE001 - reported to the front, whoever raised it
            _log.exception("%s failed", name)
            if fellows is not None and fellows.lost(error):
                failure = InternalError(f"in {name} another process of the training went away", reason=PEER_LOST)
            else:
                message = f"{name} failed in the training worker: {type(error).__name__}: {error}"
                failure = InternalError(message, reason="WORKER_ERROR")
            reply.error.CopyFrom(to_status(failure))
            reply.fatal = True
        return reply

    def _call(self, handler: Handler, command: worker.WorkerCommand, reply: worker.WorkerReply) -> None:
        match command.WhichOneof("command"):
            case "open":
                reply.open.CopyFrom(handler.open(command.open.session))
            case "run":
                reply.run.CopyFrom(handler.run())
            case "train_step":
                metrics = handler.train_step(command.train_step.step, command.train_step.samples)
                reply.train_step.CopyFrom(worker.TrainStepReply(metrics=metrics))
            case "export_weights":
                export = command.export_weights
                self._exports.add(export.directory)
                reply.export_weights.CopyFrom(handler.export_weights(export.version, export.directory))
            case "checkpoint":
                reply.checkpoint.CopyFrom(handler.checkpoint(command.checkpoint.final))
            case "compute_logprobs":
                reply.compute_logprobs.CopyFrom(handler.compute_logprobs(command.compute_logprobs))
            case "stop":
                handler.stop(command.stop.save)
                reply.stop.SetInParent()
            case other:
                raise InternalError(f"the front sent an unknown command ({other})")

    def _read(self) -> None:
        while (payload := self._receive()) is not None:
            command = worker.WorkerCommand.FromString(payload)
            if command.WhichOneof("command") == "stop":
                self._stop.set()
            self._commands.put(command)
        if not self._done.is_set():
            _log.error("the trainer's front is gone; the worker exits")
            for directory in self._exports:
                shutil.rmtree(directory, ignore_errors=True)
            os._exit(EXIT_FRONT_GONE)

    def _receive(self) -> bytes | None:
        try:
            header = self._stream.read(HEADER.size)
            if len(header) < HEADER.size:
                return None
            (length,) = HEADER.unpack(header)
            payload = self._stream.read(length)
        except OSError:
            return None
        return payload if len(payload) == length else None

    def _report(self, event: worker.WorkerEvent) -> None:
        self._send(worker.WorkerMessage(event=event))

    def _send(self, message: worker.WorkerMessage) -> None:
        with self._send_lock:
            self._socket.sendall(encode(message.SerializeToString()))


def encode(payload: bytes) -> bytes:
    """The bytes on the wire of one message. Raises InternalError if it is longer than any may be."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise InternalError(f"a message of {len(payload)} bytes; at most {MAX_MESSAGE_BYTES} pass to or from a worker")
    return HEADER.pack(len(payload)) + payload
