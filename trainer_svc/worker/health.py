"""What happens to a step whose loss or gradient is not finite, and what a step says about itself."""

from __future__ import annotations

import resource
from collections.abc import Callable

from surogate.errors import InternalError
from surogate.telemetry import metrics as names
from trainer_svc.worker.folders.checkpoint_folders import left
from trainer_svc.worker.optim.optimizer import StepOutcome
from trainer_svc.worker.session import TrainingSession

MAX_BAD_STEPS = 3
"""So many steps in a row without a finite gradient fail the session."""


def finish_step(
    session: TrainingSession, loss_of: Callable[[], float], warn: Callable[[str], None]
) -> dict[str, float]:
    """Makes the optimiser step from the gradients that are there, counts it, and returns its metrics.

    The loss is asked for afterwards: where it is still being computed, a GPU has the optimiser's work to go on with.
    A step whose gradient is not finite counts but changes nothing. Raises InternalError after MAX_BAD_STEPS in a row.
    """
    outcome = session.optimizer.step(session.step)
    loss = loss_of()
    session.step += 1
    session.bad_steps = 0 if outcome.applied else session.bad_steps + 1
    if not outcome.applied:
        _complain(session, loss, outcome, warn)
    elif session.spikes is not None:
        _ease(session, loss, outcome, warn)
    return {
        names.LOSS: loss,
        names.GRAD_NORM: outcome.grad_norm,
        names.LEARNING_RATE: outcome.learning_rate,
        names.UPDATE_SKIPPED: 0.0 if outcome.applied else 1.0,
        names.PEAK_BYTES: float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
    }


def _ease(session: TrainingSession, loss: float, outcome: StepOutcome, warn: Callable[[str], None]) -> None:
    """Lowers the learning rate from the next step on if this one had a spike."""
    assert session.spikes is not None
    spike = session.spikes.step(loss, outcome.grad_norm)
    if spike is not None:
        session.optimizer.scale = session.spikes.factor
        warn(f"step {session.step} had {spike}: learning rates are {session.spikes.factor:g} times the schedule's now")


def _complain(session: TrainingSession, loss: float, outcome: StepOutcome, warn: Callable[[str], None]) -> None:
    said = f"step {session.step} has the loss {loss} and a gradient of norm {outcome.grad_norm}"
    if session.bad_steps >= MAX_BAD_STEPS:
        raise InternalError(
            f"{said}: that is {session.bad_steps} steps in a row that are not finite; lower train.learning_rate, or "
            f"look at the data; {left(session.checkpoint_dir)}",
            reason="NOT_FINITE",
        )
    warn(f"{said}: its update was skipped")
