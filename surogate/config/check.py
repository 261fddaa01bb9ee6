"""Validates configuration files as `surogate config check` does: each by itself, and those of a GRPO job together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from surogate.config.base import ConfigModel
from surogate.config.job import MODELS, AnyJob, resolve_job
from surogate.config.load import Document, load_yaml
from surogate.config.orch import OrchConfig
from surogate.config.overrides import apply_job_overrides, apply_overrides
from surogate.config.paths import missing_paths
from surogate.config.problems import unfit, violations_of
from surogate.config.train import GRPO_ONLY, IN_ORDER
from surogate.errors import ConfigError, Violation

TITLES = {"pt": "pretraining", "sft": "supervised fine-tuning", "grpo": "GRPO"}


@dataclass
class Section:
    """What came of one file, or of the three of a GRPO job.

    Attributes:
        title: What was checked.
        errors: What is wrong, as `file:line: key: message`.
        warnings: What the author should know, in the same form.
        resolved: All keys with their values; empty if something is wrong.
    """

    title: str
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    resolved: dict[str, Any] = field(default_factory=dict)

    def render(self) -> str:
        """The section as plain text."""
        lines = [f"{self.title}: {'wrong' if self.errors else 'OK'}"]
        lines += [f"  error: {item}" for item in self.errors]
        lines += [f"  warning: {item}" for item in self.warnings]
        if self.resolved:
            text = yaml.safe_dump(self.resolved, sort_keys=False, allow_unicode=True, width=120)
            lines += ["  resolves to:", *(f"    {line}" for line in text.splitlines())]
        return "\n".join(lines)


@dataclass
class Report:
    """What came of the check of all files."""

    sections: list[Section] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors

    @property
    def errors(self) -> list[str]:
        """All that is wrong."""
        return [item for section in self.sections for item in section.errors]

    @property
    def warnings(self) -> list[str]:
        """All that the author should know."""
        return [item for section in self.sections for item in section.warnings]

    def render(self) -> str:
        """The report as plain text."""
        return "\n\n".join(section.render() for section in self.sections)


def check_files(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Report:
    """Validates files of any kind; train.yaml, infer.yaml and orch.yaml given together are one GRPO job, perhaps with
    cluster.yaml.

    `overrides` are `key=value` with one file, `train.key=value` and so on with the files of a GRPO job. Never raises
    ConfigError: what is wrong is in the report.
    """
    report = Report()
    documents: list[tuple[str, Document]] = []
    for path in paths:
        try:
            document = load_yaml(path)
        except ConfigError as error:
            report.sections.append(Section(str(path), errors=str(error).splitlines()))
        else:
            documents.append((part_of(document), document))
    try:
        documents = _overridden(documents, overrides)
    except ConfigError as error:
        report.sections.append(Section("--set", errors=str(error).splitlines()))
    parts = {part for part, _ in documents}
    if len(documents) == len(parts) and parts - {"cluster"} == {"train", "infer", "orch"}:
        return Report([*report.sections, _check_job("grpo", dict(documents))])
    report.sections += [_check_one(part, document) for part, document in documents]
    return report


def part_of(document: Document) -> str:
    """Which file it is (train, infer, orch or cluster), by its keys; if they do not tell, by its name, else train."""
    scores = {
        part: sum(_belongs(model, key, value) for key, value in document.data.items()) for part, model in MODELS.items()
    }
    name = Path(document.path).name
    return max(MODELS, key=lambda part: (scores[part], part in name))


def _belongs(model: type[ConfigModel], key: str, value: Any) -> bool:
    if key == "model" and "model" in model.model_fields:
        return (model is OrchConfig) == isinstance(value, dict)
    return key in model.model_fields or key in model.renamed or key in model.without_effect or key in model.not_yet


def _overridden(documents: list[tuple[str, Document]], overrides: Sequence[str]) -> list[tuple[str, Document]]:
    if not overrides:
        return documents
    if len(documents) == 1:
        part, document = documents[0]
        return [(part, apply_overrides(document, overrides))]
    changed = apply_job_overrides(dict(documents), overrides)
    return [(part, changed[part]) for part, _ in documents]


def _check_one(part: str, document: Document) -> Section:
    kind = _kind_of(document.data) if part == "train" else None
    if kind is not None:
        return _check_job(kind, {"train": document})
    whose = "a job" if part == "cluster" else "a GRPO job"
    title = f"{document.path} ({part}.yaml of {whose}, by itself)"
    if wrong := unfit(document.data):
        return Section(title, errors=[_placed(document, item) for item in wrong])
    found: list[Violation] = []
    try:
        model = MODELS[part].model_validate(document.data, context={"warnings": found})
    except ValidationError as error:
        wrong = [item for item in violations_of(error) if not _may_be_elsewhere(part, item)]
        return Section(title, errors=[_placed(document, item) for item in wrong], warnings=_said(document, found))
    return Section(title, warnings=_said(document, found), resolved=model.model_dump(mode="json"))


def _said(document: Document, warnings: list[Violation]) -> list[str]:
    """The warnings with their places."""
    empty = [] if document.data else [f"{document.path}: sets no key"]
    return [*empty, *(_placed(document, item) for item in warnings)]


def _may_be_elsewhere(part: str, violation: Violation) -> bool:
    """Whether it is about the model, which another file of the job may name."""
    return part == "train" and violation == Violation("model", "is required")


def _kind_of(data: dict[str, Any]) -> str | None:
    """pt or sft, by the types of its datasets; None for the trainer's side of GRPO, which has none."""
    datasets = data.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        return None
    types = [item.get("type") for item in datasets if isinstance(item, dict)]
    return "pt" if types and all(kind == "text" for kind in types) else "sft"


def _check_job(kind: str, documents: dict[str, Document]) -> Section:
    title = f"{', '.join(document.path for document in documents.values())} ({TITLES[kind]})"
    config = {"kind": kind, **{part: document.data for part, document in documents.items()}}
    try:
        job = resolve_job(config, sources=documents)
    except ConfigError as error:
        return Section(title, errors=str(error).splitlines())
    resolved = job.to_dict()
    resolved["train"] = _for_people(resolved["train"], kind)
    return Section(title, warnings=_job_warnings(job, config, documents), resolved=resolved)


def _for_people(train: dict[str, Any], kind: str) -> dict[str, Any]:
    """The keys of train.yaml that mean something in a job of this kind, the run and the model first."""
    return {key: train[key] for key in IN_ORDER if kind == "grpo" or key not in GRPO_ONLY}


def _job_warnings(job: AnyJob, config: dict[str, Any], documents: dict[str, Document]) -> list[str]:
    missing = [str(item) for item in missing_paths(config, Path.cwd())]
    placed = []
    for warning in [*job.warnings, *missing]:
        part, _, rest = warning.partition(".")
        placed.append(f"{documents[part].where(rest.partition(':')[0])}: {warning}")
    return placed


def _placed(document: Document, violation: Violation) -> str:
    return f"{document.where(violation.field)}: {violation}"
