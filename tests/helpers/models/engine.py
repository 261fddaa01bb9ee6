"""The training worker's engine in the test's own process: a reporter that keeps what it hears, and short requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.struct_pb2 import Struct

from surogate.v1 import trainer_pb2 as trainer

if TYPE_CHECKING:
    from trainer_svc.worker.engine import Engine


@dataclass
class KeepingReporter:
    """Keeps every report. `stop_after`: the step after which a stop is requested."""

    stop_after: int | None = None
    steps: dict[int, Mapping[str, float]] = field(default_factory=dict)
    checkpoints: list[tuple[int, str, bool]] = field(default_factory=list)
    evaluations: dict[int, Mapping[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def stop_requested(self) -> bool:
        return self.stop_after is not None and max(self.steps, default=0) >= self.stop_after

    @property
    def losses(self) -> list[float]:
        return [self.steps[step]["loss"] for step in sorted(self.steps)]

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps[step] = dict(metrics)

    def checkpoint(self, step: int, path: str, *, final: bool = False) -> None:
        self.checkpoints.append((step, path, final))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.evaluations[step] = dict(metrics)

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def session_request(
    kind: str, output_dir: Path, train: Mapping[str, Any], **fields: Any
) -> trainer.CreateSessionRequest:
    """CreateSession for a configuration `{kind, train}`."""
    config = Struct()
    config.update({"kind": kind, "train": dict(train)})
    return trainer.CreateSessionRequest(session_id="test", config=config, output_dir=str(output_dir), **fields)


def open_engine(
    kind: str, output_dir: Path, train: Mapping[str, Any], reporter: KeepingReporter | None = None, **fields: Any
) -> tuple[Engine, KeepingReporter]:
    """An engine with an open session, in float32 unless `train` says otherwise."""
    from trainer_svc.worker.engine import Engine

    reporter = reporter or KeepingReporter()
    engine = Engine(reporter)
    engine.open(session_request(kind, output_dir, {"torch_dtype": "float32", "optimizer": "adamw", **train}, **fields))
    return engine, reporter


def sample(
    sample_id: str,
    token_ids: Sequence[int],
    prompt_length: int,
    *,
    logprobs: Sequence[float] | None = None,
    advantage: float = 1.0,
    temperature: float = 1.0,
) -> trainer.TrainingSample:
    """A rollout whose completion begins at `prompt_length`; its sampler logprobs are -5 each if not given."""
    length = len(token_ids) - prompt_length
    sampled = [0.0] * prompt_length + list(logprobs if logprobs is not None else [-5.0] * length)
    return trainer.TrainingSample(
        sample_id=sample_id,
        token_ids=token_ids,
        loss_mask=[False] * prompt_length + [True] * length,
        sampler_logprobs=sampled,
        advantage=advantage,
        temperature=temperature,
    )
