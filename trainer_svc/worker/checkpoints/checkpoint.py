"""Checkpoints: `checkpoint-<step>/` is a model or adapter for others; its `trainer_state/` is what a resume needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from surogate.config.train import TrainConfig
from surogate.errors import DataLossError
from surogate.storage.folders import fingerprint
from surogate.storage.whole import move_files, new_folder
from trainer_svc.worker import determinism
from trainer_svc.worker.adapters import lora
from trainer_svc.worker.checkpoints.card import write_card
from trainer_svc.worker.errors import config_error
from trainer_svc.worker.folders.checkpoint_folders import STATE, Warn, forget_old, left, state_of
from trainer_svc.worker.folders.files import write_adapter, write_model
from trainer_svc.worker.session import TrainingSession
from trainer_svc.worker.shares import share_like, whole, whole_state

FORMAT = 1

Weights = Mapping[str, torch.Tensor]
State = Mapping[str, Mapping[str, torch.Tensor]]


def write_checkpoint(session: TrainingSession) -> Path:
    """Writes the state after the last step, then deletes the oldest checkpoints beyond `save_total_limit`.

    Raises DataLossError, with the path, if the disk refuses; older checkpoints are then as they were.
    """
    folder = session.checkpoint_dir / f"checkpoint-{session.step}"
    weights, state = gather_weights(session), _gather_state(session)
    session.ranks.by_first(lambda: _write_checkpoint(session, folder, weights, state))
    return folder


def _write_checkpoint(session: TrainingSession, folder: Path, weights: Weights, state: State) -> None:
    try:
        with new_folder(folder) as temporary:
            write_weights(session, weights, temporary)
            _write_state(session, state, temporary / STATE)
            _write_list(temporary)
        forget_old(
            session.checkpoint_dir,
            session.train.save_total_limit,
            step=session.step,
            keep_interval=session.keep_interval,
        )
    except (OSError, RuntimeError) as error:
        raise DataLossError(
            f"could not write {folder}: {error}; {left(session.checkpoint_dir)}", reason="CHECKPOINT_NOT_WRITTEN"
        ) from error


def gather_weights(session: TrainingSession) -> Weights:
    """The model's weights, or the adapter's, in one piece. All ranks must ask for them; rank 0 uses them."""
    policy = session.policy
    return lora.tensors(policy.adapter) if policy.adapter is not None else whole_state(policy.model)


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
    output, weights = session.output_dir, gather_weights(session)
    merging = session.train.merge_adapter and session.policy.adapter is not None
    merged = lora.merged_state(session.policy.model) if merging else None
    return output, session.ranks.by_first(lambda: _write_final(session, output, weights, merged))


def _write_final(session: TrainingSession, output: Path, weights: Weights, merged: Weights | None) -> list[str]:
    policy = session.policy
    try:
        with new_folder(output / "final") as temporary:
            write_weights(session, weights, temporary)
            write_card(session, temporary)
        names = _files(output / "final")
        move_files(output / "final", output)
        (output / "final").rmdir()
        if merged is not None:
            with new_folder(output / "merged") as temporary:
                write_model(policy.model, merged, policy.precision.stored, temporary)
                session.tokenizer.save_pretrained(temporary)
                write_card(session, temporary, merged=True)
            names += [f"merged/{name}" for name in _files(output / "merged")]
        return names
    except (OSError, RuntimeError) as error:
        raise DataLossError(
            f"could not write the final model into {output}: {error}; {left(session.checkpoint_dir)}",
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


def _gather_state(session: TrainingSession) -> State:
    """What a resume needs beside the weights, by the name of its file. All ranks must ask for it."""
    policy = session.policy
    by_rank = session.ranks.gather(determinism.rng_state())
    state = {
        "optimizer": session.optimizer.state(),
        "rng": {determinism.key(name, rank): own for rank, held in enumerate(by_rank) for name, own in held.items()},
    }
    if policy.adapter is None and policy.precision.stored != policy.precision.trained:
        state["master"] = {name: whole(weight.detach()).contiguous() for name, weight in policy.trainable().items()}
    return state


def _write_state(session: TrainingSession, tensors: State, folder: Path) -> None:
    folder.mkdir()
    for name, values in tensors.items():
        save_file(dict(values), folder / f"{name}.safetensors")
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
