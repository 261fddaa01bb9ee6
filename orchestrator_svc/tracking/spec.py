"""What the tracking process is told: which job, which trackers, and where they are."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surogate.config.job import AnyJob, GrpoJob

LIBRARIES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Module that each tracker needs; all are in the extra `tracking`."""

PROJECT = "Surogate"


@dataclass(frozen=True)
class Spec:
    """Travels as a line of JSON. `interval`: steps between samples and distributions, where they are asked for.
    `patience`: seconds that each tracker has after the job's end, fewer than this process has (see process.py).
    """

    job_id: str
    kind: str
    output_dir: str
    trackers: tuple[str, ...]
    project: str = PROJECT
    name: str = ""
    offline: bool = False
    samples: bool = False
    distributions: bool = False
    interval: int = 10
    log_file: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    patience: float = 45.0

    @classmethod
    def of(cls, job_id: str, job: AnyJob, output_dir: Path) -> Spec:
        """What a job's configuration asks for; `report_to` of orch.yaml is Weights & Biases."""
        train = job.train
        trackers = list(train.report_to or ())
        extra = job.orch.report_to if isinstance(job, GrpoJob) else None
        if extra is not None and "wandb" not in trackers:
            trackers.append("wandb")
        name = (extra.name if extra else None) or train.wandb_name
        return cls(
            job_id=job_id,
            kind=job.kind,
            output_dir=str(output_dir),
            trackers=tuple(trackers),
            project=train.wandb_project or (extra.project if extra else PROJECT),
            name=name or (train.run_name if train.run_name != "auto" else job_id),
            offline=extra.offline if extra else False,
            samples=bool(extra and extra.samples),
            distributions=bool(extra and extra.distributions),
            interval=extra.interval if extra else 10,
            log_file=train.log_file,
            config=job.to_dict(),
        )

    @property
    def wanted(self) -> bool:
        """Whether there is anything to report to."""
        return bool(self.trackers or self.log_file)

    def missing(self) -> list[str]:
        """Trackers whose library is not installed."""
        return [name for name in self.trackers if find_spec(LIBRARIES[name]) is None]

    def without(self, trackers: list[str]) -> Spec:
        """The same with fewer trackers."""
        return replace(self, trackers=tuple(name for name in self.trackers if name not in trackers))

    def line(self) -> bytes:
        """The line that `read` takes."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes | str) -> Spec:
        """What `line` wrote."""
        given = json.loads(line)
        return cls(**{**given, "trackers": tuple(given["trackers"])})
