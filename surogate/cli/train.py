"""What `pt`, `sft` and `grpo` share: from files and flags to a job."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surogate.cli.exits import usage
from surogate.errors import ConfigError

if TYPE_CHECKING:
    from surogate.config.load import Document


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """A training command as given."""

    kind: str
    files: dict[str, Path]
    """train.yaml and, for grpo, infer.yaml and orch.yaml, perhaps cluster.yaml, by their names without the ending."""
    overrides: tuple[str, ...]
    server: str | None
    detach: bool
    job_id: str
    labels: tuple[str, ...]
    output_dir: str | None

    def run(self) -> int:
        """Runs the job; returns the exit code. Raises SurogateError for what is wrong with files and flags."""
        if self.detach and not self.server:
            raise usage("--detach", "needs --server: a job on this machine ends with this command")
        from surogate.cli.jobs import parse_labels
        from surogate.client.jobs import config_of, job_documents

        labels = parse_labels(self.labels)
        documents = job_documents(self.kind, self.files, self._all_overrides())
        if self.server:
            from surogate.cli.running.launch import Launch, launch_remote

            launch = Launch(config_of(self.kind, documents), self.job_id, labels)
            with naming_places(documents):
                return launch_remote(launch, self.server, detach=self.detach)
        config, output_dir = local_job(self.kind, documents)
        from surogate.cli.running.launch import Launch, launch_local

        return launch_local(Launch(config, self.job_id, labels), output_dir)

    def _all_overrides(self) -> list[str]:
        parts = ["train", "orch"] if self.kind == "grpo" else ["train"]
        keys = [f"{part}.output_dir" if len(self.files) > 1 else "output_dir" for part in parts]
        folder = [f"{key}={json.dumps(self.output_dir)}" for key in keys if self.output_dir is not None]
        return [*self.overrides, *folder]


def local_job(kind: str, documents: Mapping[str, Document]) -> tuple[dict[str, Any], Path]:
    """Checks a job for this machine before anything is started: its configuration and its output folder.

    Paths in it are absolute then. Raises ConfigError with the file and line of what is wrong.
    """
    from surogate.client.jobs import config_of
    from surogate.config.job import resolve_job
    from surogate.config.paths import absolute_paths, missing_paths

    config = config_of(kind, documents)
    job = resolve_job(config, sources=documents)
    with naming_places(documents):
        if missing := missing_paths(config, Path.cwd()):
            raise ConfigError.of(missing)
    given = config.get("orch", {}).get("output_dir") or config["train"].get("output_dir")
    default = job.orch.output_dir if job.kind == "grpo" else job.train.output_dir
    return absolute_paths(config, Path.cwd(), outputs=True), Path(given or default).expanduser().resolve()


@contextmanager
def naming_places(documents: Mapping[str, Document]) -> Iterator[None]:
    """Adds file and line to the violations of a ConfigError that knows keys only, as one from a server."""
    try:
        yield
    except ConfigError as error:
        if not error.violations:
            raise
        lines = [f"{place(documents, item.field)}{item}" for item in error.violations]
        raise ConfigError("\n".join(lines), violations=error.violations) from error


def place(documents: Mapping[str, Document], key: str) -> str:
    """`train.yaml:12: ` for a key that was set there; empty for what is in no file."""
    part, _, rest = key.partition(".")
    return f"{documents[part].where(rest)}: " if part in documents else ""
