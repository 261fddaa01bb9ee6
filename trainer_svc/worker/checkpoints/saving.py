"""Saves checkpoints and the final model: into the output folder, and the object store where there is one."""

from __future__ import annotations

from surogate.errors import ConfigError, DataLossError
from surogate.storage.objects import StorageError
from trainer_svc.worker.checkpoints.checkpoint import write_checkpoint, write_final
from trainer_svc.worker.folders.checkpoint_folders import Warn
from trainer_svc.worker.folders.remote import Saved
from trainer_svc.worker.session import TrainingSession


def save_checkpoint(session: TrainingSession, warn: Warn) -> Saved | None:
    """Writes a checkpoint of the session, and uploads it where a store keeps them.

    None: it is in the output folder, but the store would not have it, as a warning says; `session.remote.saved` is the
    newest that is safe. Raises DataLossError if the disk refuses.
    """
    path, remote = write_checkpoint(session), session.remote
    if remote is None:
        return Saved(session.step, str(path))

    def upload() -> str:
        try:
            train = session.train
            remote.upload(path, session.step, limit=train.save_total_limit, keep_interval=session.keep_interval)
        except (StorageError, ConfigError) as error:
            return str(error)
        return ""

    problem = session.ranks.by_first(upload)
    if problem:
        warn(f"checkpoint {session.step} is in {path} alone: {problem}")
    remote.saved = session.ranks.of_first(remote.saved)
    return None if problem else remote.saved


def save_final(session: TrainingSession) -> str:
    """Writes the final model or adapter; returns where it is. Raises DataLossError if disk or store refuse."""
    output, names = write_final(session)
    remote = session.remote
    if remote is None:
        return str(output)

    def upload() -> str:
        try:
            return remote.upload_final(output, names)
        except (StorageError, ConfigError) as error:
            message = f"the final model is in {output} alone: {error}"
            raise DataLossError(message, reason="MODEL_NOT_UPLOADED") from error

    return session.ranks.by_first(upload)
