"""One small class for each tracker. Their libraries are imported when one is opened, in the tracking process only."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator_svc.tracking.spec import Spec

Row = Mapping[str, Any]

SUCCEEDED, FAILED, CANCELLED, INTERRUPTED = "SUCCEEDED", "FAILED", "CANCELLED", "INTERRUPTED"
"""How a job ended; interrupted: it goes on with another orchestrator."""


class Tracker(ABC):
    """A place to report to. `memory` is kept with the job: what a tracker puts there it finds again after a restart."""

    def __init__(self, spec: Spec, memory: dict[str, Any]) -> None:
        self.spec = spec
        self.memory = memory
        self.folder = Path(spec.output_dir)

    @abstractmethod
    def metrics(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Reports numbers of a step; `seconds` since the epoch."""

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """Shows rollouts: mappings with `prompt`, `completion`, `reward`. Left out where there is no place for it."""
        del step, rows

    def distribution(self, step: int, name: str, values: Sequence[float]) -> None:
        """Shows how values are distributed. Left out where there is no place for it."""
        del step, name, values

    @abstractmethod
    def close(self, how: str) -> None:
        """Writes out what is left."""


class LogFile(Tracker):
    """`log_file`: a line for each step and evaluation."""

    def __init__(self, spec: Spec, memory: dict[str, Any]) -> None:
        super().__init__(spec, memory)
        path = self.folder / str(spec.log_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def metrics(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
        shown = " ".join(f"{name}={value:.6g}" for name, value in values.items())
        self._file.write(f"{when} step {step} {shown}\n")
        self._file.flush()

    def close(self, how: str) -> None:
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} {how.lower()}\n")
        self._file.close()


class TensorBoard(Tracker):
    """Event files in `tensorboard/` of the job's folder, written without torch or TensorFlow."""

    def __init__(self, spec: Spec, memory: dict[str, Any]) -> None:
        super().__init__(spec, memory)
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._tensor, self._types = event_pb2, summary_pb2, tensor_pb2, types_pb2
        self._writer = EventFileWriter(str(self.folder / "tensorboard"))

    def metrics(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        self._add(step, seconds, [self._summary.Summary.Value(tag=k, simple_value=v) for k, v in values.items()])

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        texts = [f"**{row['reward']:.3f}** {row['prompt']}\n\n{row['completion']}".encode() for row in rows]
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        tensor = self._tensor.TensorProto(dtype=self._types.DT_STRING, string_val=texts)
        tensor.tensor_shape.dim.add(size=len(texts))
        metadata = self._summary.SummaryMetadata(plugin_data=plugin)
        self._add(step, time.time(), [self._summary.Summary.Value(tag="samples", tensor=tensor, metadata=metadata)])

    def distribution(self, step: int, name: str, values: Sequence[float]) -> None:
        import numpy as np

        counts, edges = np.histogram(values, bins=30)
        histogram = self._summary.HistogramProto(
            min=min(values),
            max=max(values),
            num=len(values),
            sum=sum(values),
            sum_squares=sum(value * value for value in values),
            bucket_limit=edges[1:].tolist(),
            bucket=counts.tolist(),
        )
        self._add(step, time.time(), [self._summary.Summary.Value(tag=name, histo=histogram)])

    def close(self, how: str) -> None:
        self._writer.flush()  # raises what its thread met, such as a full disk; close does not
        self._writer.close()

    def _add(self, step: int, seconds: float, values: list[Any]) -> None:
        self._writer.add_event(
            self._event.Event(wall_time=seconds, step=step, summary=self._summary.Summary(value=values))
        )


class Wandb(Tracker):
    """Weights & Biases; offline runs lie in `wandb/` of the job's folder, for `wandb sync`."""

    def __init__(self, spec: Spec, memory: dict[str, Any]) -> None:
        super().__init__(spec, memory)
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=spec.project,
            name=spec.name,
            id=memory.setdefault("id", spec.job_id),
            resume="allow",
            dir=spec.output_dir,
            config=spec.config,
            mode="offline" if spec.offline else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")

    def metrics(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        columns = ["prompt", "completion", "reward"]
        data = [[row[name] for name in columns] for row in rows]
        self._run.log({"samples": self._wandb.Table(columns=columns, data=data), "step": step})

    def distribution(self, step: int, name: str, values: Sequence[float]) -> None:
        self._run.log({name: self._wandb.Histogram(list(values)), "step": step})

    def close(self, how: str) -> None:
        self._run.finish(exit_code=0 if how == SUCCEEDED else 1)


class Mlflow(Tracker):
    """MLflow at `MLFLOW_TRACKING_URI`; without that variable in `mlflow.db` of the job's folder."""

    _STATES = {SUCCEEDED: "FINISHED", FAILED: "FAILED", CANCELLED: "KILLED"}  # noqa: RUF012 - never changed

    def __init__(self, spec: Spec, memory: dict[str, Any]) -> None:
        super().__init__(spec, memory)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        if "run" not in memory:
            known = self._client.get_experiment_by_name(spec.project)
            artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else (self.folder / "mlflow").as_uri()
            experiment = known.experiment_id if known else self._client.create_experiment(spec.project, artifacts)
            memory["run"] = self._client.create_run(experiment, run_name=spec.name).info.run_id
            values = [Param(key, str(value)[:500]) for key, value in _scalars(spec.config)]
            for start in range(0, len(values), 100):
                self._client.log_batch(memory["run"], params=values[start : start + 100])
        self._run: str = memory["run"]

    def metrics(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        time_ms = int(seconds * 1000)
        self._client.log_batch(
            self._run, metrics=[self._metric(name, value, time_ms, step) for name, value in values.items()]
        )

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        self._client.log_text(self._run, json.dumps(list(rows), default=str), f"samples/step-{step}.json")

    def close(self, how: str) -> None:
        if how in self._STATES:
            self._client.set_terminated(self._run, self._STATES[how])


def _scalars(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Keys with plain values, blocks as `block.key`; what is null or a list is left out."""
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{name}.")
        elif isinstance(value, str | int | float):
            found.append((f"{prefix}{name}", value))
    return found


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}
"""By their names in `report_to`."""
