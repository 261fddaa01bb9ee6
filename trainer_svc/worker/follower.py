"""Ranks other than the first: they carry out what rank 0 passes on, in step with it, and answer nobody."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from surogate.errors import DataLossError, InternalError, SurogateError
from surogate.internal.v1 import worker_pb2 as worker
from trainer_svc.worker.engine import Engine
from trainer_svc.worker.ranks import Ranks
from trainer_svc.worker_protocol import EXIT_PEER_LOST

_log = logging.getLogger("trainer.worker")


class SilentReporter:
    """Reports nothing: rank 0 does."""

    stop_requested = False

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def checkpoint(self, step: int, path: str, *, final: bool = False) -> None:
        """Nothing."""

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def warning(self, text: str) -> None:
        """Nothing."""


def run() -> int:
    """Joins the others and follows rank 0; returns the exit code."""
    ranks = Ranks.join()
    return follow(ranks, Engine(SilentReporter(), ranks))


def follow(ranks: Ranks, engine: Engine) -> int:
    """Carries commands out until a stop (returns 0), an error (1), or until another rank is gone (EXIT_PEER_LOST).

    What rank 0 refuses this rank refuses too, for both have the same command; it is rank 0 that says so.
    """
    while True:
        name = None
        try:
            command = worker.WorkerCommand.FromString(ranks.await_command())
            name = command.WhichOneof("command")
            _carry_out(engine, command)
        except (InternalError, DataLossError) as error:
            _log.error("rank %d: %s failed: %s", ranks.rank, name, error)
            return 1
        except SurogateError as error:
            if name in ("open", "run", "stop"):
                _log.error("rank %d: %s failed: %s", ranks.rank, name, error)
                return 1
        except Exception as error:  # noqa: BLE001 - the exit code and the log tell the front, whoever raised it
            if ranks.lost(error):
                _log.error("rank %d: another process of the training is gone", ranks.rank)
                return EXIT_PEER_LOST
            _log.exception("rank %d: %s failed", ranks.rank, name)
            return 1
        if name == "stop":
            return 0


def _carry_out(engine: Engine, command: worker.WorkerCommand) -> None:
    match command.WhichOneof("command"):
        case "open":
            engine.open(command.open.session)
        case "run":
            engine.run()
        case "train_step":
            engine.train_step(command.train_step.step, command.train_step.samples)
        case "export_weights":
            engine.export_weights(command.export_weights.version, command.export_weights.directory)
        case "checkpoint":
            engine.checkpoint(command.checkpoint.final)
        case "compute_logprobs":
            engine.compute_logprobs(command.compute_logprobs)
        case "stop":
            engine.stop(command.stop.save)
        case other:
            raise InternalError(f"rank 0 passed on an unknown command ({other})")
