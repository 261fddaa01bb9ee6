"""Checkpoints: `checkpoint-<step>/` is a model or adapter for others; its `trainer_state/` is what a resume needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors.torch import load_file, save_file

from surogate.config.train import TrainConfig
from surogate.errors import DataLossError
from surogate.storage.folders import fingerprint
from surogate.storage.whole import as_os_errors, move_files, new_folder
from trainer_svc.worker import determinism
from trainer_svc.worker.adapters import lora
from trainer_svc.worker.checkpoints.card import write_card
from trainer_svc.worker.errors import config_error
from trainer_svc.worker.folders.checkpoint_folders import STATE, Warn, forget_old, left, state_of
from trainer_svc.worker.folders.files import write_adapter, write_model
from trainer_svc.worker.session import TrainingSession
from trainer_svc.worker.shares import collected, share_like, whole_state

FORMAT = 1

Weights = Mapping[str, torch.Tensor]
Gather = Callable[[], Weights]
Write = Callable[[Weights], None]
T = TypeVar("T")


def write_checkpoint(session: TrainingSession) -> Path:
    """Writes the state after the last step, then deletes the oldest checkpoints beyond `save_total_limit`.

    Raises DataLossError, with the path, if the disk refuses; older checkpoints are then as they were.
    """
    path, by_first = session.checkpoint_dir / f"checkpoint-{session.step}", session.ranks.by_first
    with ExitStack() as held:  # of rank 0: the others' stays empty
        folder = by_first(lambda: _tried(session, path, lambda: held.enter_context(new_folder(path))))
        for gather, write in _parts(session, folder):
            _gathered_and_written(session, path, gather, write)
        by_first(lambda: _tried(session, path, lambda: _finish(session, folder, held)))
    return path


def _parts(session: TrainingSession, folder: Path) -> list[tuple[Gather, Write]]:
    """What is gathered, and how each is written, one after the other: rank 0 never holds two of them."""
    policy, state = session.policy, folder / STATE

    def masters() -> Weights:
        return {name: value.contiguous() for name, value in collected(policy.trainable()).items()}

    parts: list[tuple[Gather, Write]] = [
        (lambda: gather_weights(session), lambda weights: write_weights(session, weights, folder)),
        (session.optimizer.state, lambda moments: _write_tensors(moments, state / "optimizer.safetensors")),
        (lambda: _random_states(session), lambda states: _write_tensors(states, state / "rng.safetensors")),
    ]
    if policy.adapter is None and policy.precision.stored != policy.precision.trained:
        parts.append((masters, lambda weights: _write_tensors(weights, state / "master.safetensors")))
    return parts


def _gathered_and_written(session: TrainingSession, path: Path, gather: Gather, write: Write) -> None:
    """All ranks gather, rank 0 writes. What was gathered ends with this call."""
    tensors = gather()
    session.ranks.by_first(lambda: _tried(session, path, lambda: write(tensors)))


def _tried(session: TrainingSession, path: Path, work: Callable[[], T]) -> T:
    """Does it; a disk that refuses is a DataLossError."""
    try:
        with as_os_errors():
            return work()
    except (OSError, RuntimeError) as error:
        raise DataLossError(
            f"could not write {path}: {error}; {left(session.checkpoint_dir)}", reason="CHECKPOINT_NOT_WRITTEN"
        ) from error


def _finish(session: TrainingSession, folder: Path, held: ExitStack) -> None:
    """Gives the folder its name, and forgets older ones."""
    _write_state(session, folder / STATE)
    _write_list(folder)
    held.close()
    forget_old(
        session.checkpoint_dir,
        session.train.save_total_limit,
        step=session.step,
        keep_interval=session.keep_interval,
    )


def gather_weights(session: TrainingSession) -> Weights:
    """The model's weights, or the adapter's, in one piece: on rank 0. All ranks must ask for them."""
    policy = session.policy
    if policy.adapter is not None:
        return lora.tensors(policy.adapter)
    return whole_state(policy.model, policy.precision.stored)


def write_weights(session: TrainingSession, weights: Weights, folder: Path) -> None:
    """Writes the model (or the adapter) and the tokenizer for others to load."""
    policy = session.policy
    if policy.adapter is not None:
        write_adapter(policy.adapter, weights, folder)
    else:
        write_model(policy.model, weights, policy.precision.stored, folder)
    session.tokenizer.save_pretrained(folder)


def write_final(session: TrainingSession) -> tuple[Path, list[str]]:
    """Writes the final model or adapter into the output folder itself, and the merged model if asked for.

    Returns the folder, and the names of the files there. Raises DataLossError, with the path, if the disk refuses.
    """
    output, by_first = session.output_dir, session.ranks.by_first
    names = _written_final(session, output)
    if session.train.merge_adapter and session.policy.adapter is not None:
        merged = lora.merged_state(session.policy.model)
        names += by_first(lambda: _tried_final(session, lambda: _write_merged(session, merged, output)))
    return output, names


def _written_final(session: TrainingSession, output: Path) -> list[str]:
    weights = gather_weights(session)
    return session.ranks.by_first(lambda: _tried_final(session, lambda: _write_final(session, weights, output)))


def _write_final(session: TrainingSession, weights: Weights, output: Path) -> list[str]:
    with new_folder(output / "final") as temporary:
        write_weights(session, weights, temporary)
        write_card(session, temporary)
    names = _files(output / "final")
    move_files(output / "final", output)
    (output / "final").rmdir()
    return names


def _write_merged(session: TrainingSession, merged: Weights, output: Path) -> list[str]:
    policy = session.policy
    with new_folder(output / "merged") as temporary:
        write_model(policy.model, merged, policy.precision.stored, temporary)
        session.tokenizer.save_pretrained(temporary)
        write_card(session, temporary, merged=True)
    return [f"merged/{name}" for name in _files(output / "merged")]


def _tried_final(session: TrainingSession, work: Callable[[], list[str]]) -> list[str]:
    try:
        return work()
    except (OSError, RuntimeError) as error:
        raise DataLossError(
            f"could not write the final model into {session.output_dir}: {error}; {left(session.checkpoint_dir)}",
            reason="MODEL_NOT_WRITTEN",
        ) from error


def check_same_kind(path: Path, kind: str, train: TrainConfig) -> None:
    """Raises ConfigError for a checkpoint that a run of this kind cannot go on from."""
    state = state_of(path)
    anew = "or set resume_from_checkpoint: false to start anew"
    if state["kind"] != kind:
        key = "output_dir" if train.checkpoint_dir is None else "checkpoint_dir"
        text = f"has checkpoints of a {state['kind']} run, and this is {kind}: choose another folder, {anew}"
        raise config_error(key, f"{text} ({path})")
    if state["train"]["lora"] != train.lora:
        has = "an adapter's weights alone" if state["train"]["lora"] else "all weights of a model, and no adapter"
        raise config_error("lora", f"is {str(train.lora).lower()}, and {path} has {has}; make them agree, {anew}")


def restore(session: TrainingSession, path: Path, warn: Warn) -> None:
    """Gives the session the optimiser, masters, random state and step of a checkpoint whose weights it has loaded."""
    state = state_of(path)
    for key, before, now in _differences(state["train"], session.train.model_dump(mode="json")):
        warn(f"{path.name} was written with train.{key} = {before}, and the run goes on with {now}")
    if state.get("ranks", 1) != session.ranks.world_size:
        warn(
            f"{path.name} was written by {state.get('ranks', 1)} processes, and {session.ranks.world_size} go on: sums "
            "may differ in their last bits, and dropout does"
        )
    if state["threads"] != torch.get_num_threads():
        warn(
            f"{path.name} was written with {state['threads']} threads, and the run goes on with "
            f"{torch.get_num_threads()}: sums may differ in their last bits"
        )
    masters = path / STATE / "master.safetensors"
    if masters.is_file():
        trainable = session.policy.trainable()
        with torch.no_grad():
            for name, value in load_file(masters).items():
                trainable[name].copy_(share_like(value, trainable[name]))
    if state["train"].get("optimizer") == session.train.optimizer:
        session.optimizer.restore(load_file(path / STATE / "optimizer.safetensors"))
    else:
        warn(f"the moments of {session.train.optimizer} start at zero: {path.name} has those of another optimizer")
    determinism.restore_rng_state(load_file(path / STATE / "rng.safetensors"), session.ranks.rank)
    session.step = int(state["step"])
    session.watch(state.get("watch", {}))
    session.bad_steps = int(state["bad_steps"])


def _random_states(session: TrainingSession) -> Weights:
    by_rank = session.ranks.gather(determinism.rng_state())
    return {determinism.key(name, rank): own for rank, held in enumerate(by_rank) for name, own in held.items()}


def _write_tensors(tensors: Weights, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(dict(tensors), path)


def _write_state(session: TrainingSession, folder: Path) -> None:
    state = {
        "format": FORMAT,
        "kind": session.kind,
        "step": session.step,
        "bad_steps": session.bad_steps,
        "threads": torch.get_num_threads(),
        "ranks": session.ranks.world_size,
        "watch": {
            name: asdict(watcher) for name, watcher in (("spikes", session.spikes), ("end", session.end)) if watcher
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "train": session.train.model_dump(mode="json"),
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_list(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {str(path.relative_to(folder)): fingerprint(path) for path in files}
    (folder / STATE / "files.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


_MAY_CHANGE = frozenset({"output_dir", "checkpoint_dir", "resume_from_checkpoint", "run_name", "save_steps"})
"""Keys whose change alters nothing of what is computed."""


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = sorted((set(before) | set(now)) - _MAY_CHANGE)
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]
