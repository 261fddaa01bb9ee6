"""Small things about jobs that clients need: names, states, and configurations from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surogate.errors import InvalidInputError
from surogate.structs import from_struct
from surogate.v1 import job_pb2

if TYPE_CHECKING:
    from surogate.config.load import Document

Kind = Literal["pt", "sft", "grpo"]
Part = Mapping[str, Any] | str | PathLike[str]

ENDED = frozenset({job_pb2.Job.STATE_SUCCEEDED, job_pb2.Job.STATE_FAILED, job_pb2.Job.STATE_CANCELLED})
"""States that a job never leaves."""


def has_ended(job: job_pb2.Job) -> bool:
    """Whether a job has succeeded, failed or been cancelled."""
    return job.state in ENDED


def state_name(state: int) -> str:
    """A state as people write it: `running`."""
    return _short(job_pb2.Job.State.Name, state, "STATE_")


def kind_name(kind: int) -> str:
    """A kind as people write it: `grpo`."""
    return _short(job_pb2.Job.Kind.Name, kind, "KIND_")


def job_name(job: str | job_pb2.Job) -> str:
    """Resource name of a job given as a message, an id (`my-job`) or a name (`jobs/my-job`)."""
    name = job.name if isinstance(job, job_pb2.Job) else job
    return name if name.startswith("jobs/") else f"jobs/{name}"


def train_keys(job: job_pb2.Job) -> dict[str, Any]:
    """The `train` part of a job's configuration; empty if it has none."""
    train = from_struct(job.config).get("train")
    return train if isinstance(train, dict) else {}


def job_config(
    kind: Kind,
    train: Part,
    *,
    infer: Part | None = None,
    orch: Part | None = None,
    cluster: Part | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Puts together the configuration of a job from YAML files or mappings.

    `overrides` are `key=value` with YAML values; with several files the key begins with the file's name:
    `train.learning_rate=1e-5`, `orch.max_steps=10`. Relative paths in the files stay as they are: they mean folders on
    the orchestrator's side. Raises ConfigError for a file that is missing or is not YAML, InvalidInputError for parts
    that the kind has not.

        job_config("pt", train={"model": "/models/tiny", "datasets": [{"path": "/data/a.jsonl", "type": "text"}]})
        job_config("grpo", train="train.yaml", infer="infer.yaml", orch="orch.yaml", overrides=["orch.max_steps=10"])
    """
    parts = {"train": train, "infer": infer, "orch": orch, "cluster": cluster}
    documents = job_documents(kind, parts, overrides)
    return config_of(kind, documents)


def config_of(kind: str, documents: Mapping[str, Document]) -> dict[str, Any]:
    """The configuration that documents make together."""
    return {"kind": kind, **{name: document.data for name, document in documents.items()}}


def job_documents(kind: str, parts: Mapping[str, Part | None], overrides: Sequence[str] = ()) -> dict[str, Document]:
    """The documents of a job by their names, overrides applied; they know the line of each key. See `job_config`."""
    given = {name: part for name, part in parts.items() if part is not None}
    needed = set(given) - {"cluster"}
    if kind == "grpo" and len(needed) < 3:
        raise InvalidInputError("a grpo job has three parts: train, infer and orch, and perhaps cluster")
    if kind != "grpo" and needed != {"train"}:
        raise InvalidInputError(f"a {kind} job has one part: train, and perhaps cluster")
    from surogate.config.overrides import apply_job_overrides, apply_overrides

    documents = {name: _load(name, part) for name, part in given.items()}
    if len(documents) > 1:
        return apply_job_overrides(documents, overrides)
    return {"train": apply_overrides(documents["train"], overrides)}


def _short(name: Any, number: int, prefix: str) -> str:
    try:
        return str(name(number)).removeprefix(prefix).lower()
    except ValueError:  # a newer server may know more
        return str(number)


def _load(name: str, part: Part) -> Document:
    from surogate.config.load import Document, load_yaml

    return Document(name, dict(part)) if isinstance(part, Mapping) else load_yaml(Path(part))
