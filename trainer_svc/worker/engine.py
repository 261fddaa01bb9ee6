"""The worker's engine: carries out what the front asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import ValidationError

from surogate.config.problems import violations_of
from surogate.config.train import TrainConfig
from surogate.errors import ConfigError, DataLossError, FailedPreconditionError, OutOfRangeError, Violation
from surogate.internal.v1 import worker_pb2 as worker
from surogate.storage.whole import remove_leftovers
from surogate.structs import from_struct
from surogate.urls import is_url
from surogate.v1 import common_pb2, weights_pb2
from surogate.v1 import trainer_pb2 as trainer
from trainer_svc.worker import determinism, grpo
from trainer_svc.worker.adapters.lora_targets import remark
from trainer_svc.worker.checkpoints.checkpoint import check_same_kind, restore
from trainer_svc.worker.checkpoints.saving import save_checkpoint, save_final
from trainer_svc.worker.data.prepare import prepare
from trainer_svc.worker.export import export_weights
from trainer_svc.worker.folders import checkpoint_folders
from trainer_svc.worker.folders.remote import RemoteCheckpoints, Saved, newest
from trainer_svc.worker.pushes import plan_pushes
from trainer_svc.worker.quantized.state import count_parameters
from trainer_svc.worker.ranks import Ranks
from trainer_svc.worker.score import score
from trainer_svc.worker.session import Kind, TrainingSession, checkpoint_folder, load_session
from trainer_svc.worker.supervised import SupervisedRun
from trainer_svc.worker_protocol import Reporter


class Engine:
    """Implements `trainer_svc.worker_protocol.Handler`."""

    def __init__(self, reporter: Reporter, ranks: Ranks | None = None) -> None:
        self._reporter = reporter
        self._ranks = ranks or Ranks()
        self._opened: TrainingSession | None = None
        self._run: SupervisedRun | None = None
        self._saved: Saved | None = None
        """The newest checkpoint from which the job can go on."""

    @property
    def session(self) -> TrainingSession:
        """The session. Raises FailedPreconditionError before `open`."""
        if self._opened is None:
            raise FailedPreconditionError("no session is open")
        return self._opened

    def open(self, session: trainer.CreateSessionRequest) -> worker.OpenReply:
        """Loads everything, from a checkpoint if there is one to resume from."""
        kind, train = read_config(session)
        determinism.set_up(train.train_seed)
        output_dir = Path(session.output_dir or train.output_dir).expanduser()
        folder = checkpoint_folder(train, output_dir)
        remote = RemoteCheckpoints(str(train.checkpoint_dir)) if is_url(train.checkpoint_dir) else None
        if self._ranks.first:
            for path in {folder, output_dir}:
                remove_leftovers(path)
        source = self._resume_from(session, train, folder, remote)
        if source is not None:
            check_same_kind(source, kind, train)
        opened = load_session(kind, train, output_dir, source, self._ranks)
        opened.keep_interval = session.keep_interval
        opened.remote = remote
        left = remark(opened.policy.adapter, train) if opened.policy.adapter is not None else None
        if left is not None:
            self._reporter.warning(left)
        if kind == "grpo":
            opened.pushes = plan_pushes(opened.policy, train, merge=session.merge_pushes)
            if opened.pushes.remark:
                self._reporter.warning(opened.pushes.remark)
        total_steps = max(train.max_steps, 0)
        if kind != "grpo":
            data = self._ranks.first_goes_first(
                lambda: prepare(train, opened.tokenizer, opened.policy.vocab_size, self._reporter.warning)
            )
            self._run = SupervisedRun(opened, data, self._reporter)
            total_steps = self._run.total_steps
        elif train.lora and train.lora_dropout > 0 and "lora_dropout" in train.model_fields_set:
            self._reporter.warning("train.lora_dropout is 0 in GRPO, so that the policy is the one that was sampled")
        opened.start_optimizer(total_steps)
        if source is not None:
            restore(opened, source, self._reporter.warning)
            self._saved = opened.remote.saved if opened.remote else Saved(opened.step, str(source))
        self._opened = opened
        trainable, parameters = count_parameters(opened.policy.model)
        return worker.OpenReply(
            step=opened.step,
            max_steps=total_steps,
            checkpoint=str(source or "") if remote is None or remote.saved is None else remote.saved.location,
            checkpoint_step=opened.step if source else 0,
            num_trainable_parameters=trainable,
            num_parameters=parameters,
            vocab_size=opened.policy.vocab_size,
            max_sequence_length=train.sequence_len,
            push_kind=opened.pushes.kind if kind == "grpo" else weights_pb2.WEIGHT_KIND_UNSPECIFIED,
        )

    def run(self) -> worker.RunReply:
        """Trains to the end (PT, SFT)."""
        if self._run is None:
            raise FailedPreconditionError("a GRPO session takes steps; it does not run by itself")
        return worker.RunReply(stopped=self._run.run())

    def train_step(self, step: int, samples: Sequence[trainer.TrainingSample]) -> Mapping[str, float]:
        """Trains one GRPO step."""
        session = self.session
        if step != session.step + 1:
            raise OutOfRangeError(f"step {step} follows step {session.step}", reason="STEP_OUT_OF_ORDER")
        return grpo.train_step(session, samples, self._reporter)

    def export_weights(self, version: int, directory: str) -> worker.ExportWeightsReply:
        """Writes the weights for inference."""
        return export_weights(self.session, version, Path(directory))

    def checkpoint(self, final: bool) -> trainer.TrainerCheckpoint:
        """Writes a checkpoint, unless there is one of this very step, and the final model if asked for."""
        session = self.session
        path = session.checkpoint_dir / f"checkpoint-{session.step}"
        if self._saved is None or self._saved.step != session.step or not self._ranks.of_first(path.is_dir()):
            self._saved = save_checkpoint(session, self._reporter.warning) or self._safe()
        if final:
            return trainer.TrainerCheckpoint(step=session.step, path=save_final(session), final=True)
        return trainer.TrainerCheckpoint(step=self._saved.step, path=self._saved.location)

    def _safe(self) -> Saved:
        """The newest checkpoint of the object store, when it would not have the one of now."""
        remote = self.session.remote
        assert remote is not None, "without a store a checkpoint is saved, or an error"
        if remote.saved is None:
            raise DataLossError(f"{remote.url} has no checkpoint yet, and takes none", reason="CHECKPOINT_NOT_UPLOADED")
        return remote.saved

    def compute_logprobs(self, request: trainer.ComputeLogprobsRequest) -> trainer.ComputeLogprobsResponse:
        """Logprobs of given tokens."""
        temperature = request.temperature if request.HasField("temperature") else 1.0
        session = self.session
        found = score(session.policy, [s.ids for s in request.sequences], temperature, session.train.sequence_len)
        return trainer.ComputeLogprobsResponse(
            sequences=[common_pb2.TokenLogprobs(logprobs=logprobs) for logprobs in found]
        )

    def stop(self, save: bool) -> None:
        """Writes a checkpoint if asked to and there is none of this step."""
        session = self._opened
        if not save or session is None or session.step == 0:
            return
        if self._ranks.of_first(checkpoint_folders.has(session.checkpoint_dir, session.step)):
            return
        saved = save_checkpoint(session, self._reporter.warning)
        if saved is not None:
            self._reporter.checkpoint(saved.step, saved.location)

    def _resume_from(
        self, request: trainer.CreateSessionRequest, train: TrainConfig, folder: Path, remote: RemoteCheckpoints | None
    ) -> Path | None:
        """The checkpoint to go on from; None to start anew. Raises NotFoundError or DataLossError for a named one."""
        named: str | None = request.resume_from
        if remote is not None and not named and not request.fresh and train.resume_from_checkpoint:
            alone = self._ranks.world_size == 1
            named = self._ranks.of_first(
                newest(remote, folder, self._reporter.warning, alone=alone) if self._ranks.first else None
            )
            if named is None:
                return None
        if remote is not None and named and is_url(named):
            remote.saved = remote.saved or Saved(checkpoint_folders.step_in(Path(named).name) or 0, named)
            return remote.fetch(named, folder)
        if named:
            path = Path(named).expanduser()
            if self._ranks.first:
                checkpoint_folders.verify(path)
            return path
        if request.fresh or not train.resume_from_checkpoint:
            return None
        return self._ranks.of_first(
            checkpoint_folders.newest_good(folder, self._reporter.warning) if self._ranks.first else None
        )


def read_config(session: trainer.CreateSessionRequest) -> tuple[Kind, TrainConfig]:
    """The kind and the training configuration of a session. Raises ConfigError naming the keys that are wrong."""
    data: dict[str, Any] = from_struct(session.config)
    kind = data.get("kind")
    if kind not in get_args(Kind):
        raise ConfigError.of([Violation("kind", f"must be one of {', '.join(get_args(Kind))}, got {kind!r}")])
    try:
        return cast(Kind, kind), TrainConfig.model_validate(data.get("train", {}))
    except ValidationError as error:
        raise ConfigError.of(violations_of(error, "train")) from error
