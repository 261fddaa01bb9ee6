"""A job's configuration, resolved: validated, defaults filled in, and for GRPO the three files made to agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

from pydantic import ValidationError

from surogate.config.base import NOT_YET, ConfigModel, nearest, shown
from surogate.config.cluster import ClusterConfig
from surogate.config.infer import InferConfig
from surogate.config.load import Document
from surogate.config.loss import AipoLoss, ClipLoss, DppoLoss, IpoLoss
from surogate.config.orch import OrchConfig
from surogate.config.paths import unknown_homes
from surogate.config.problems import unfit, violations_of
from surogate.config.reconcile import reconcile
from surogate.config.train import GRPO_ONLY, TrainConfig
from surogate.errors import ConfigError, Violation

PARTS: dict[str, tuple[str, ...]] = {"pt": ("train",), "sft": ("train",), "grpo": ("train", "infer", "orch")}
"""The parts of a job of each kind."""
MODELS: dict[str, type[ConfigModel]] = {
    "train": TrainConfig,
    "infer": InferConfig,
    "orch": OrchConfig,
    "cluster": ClusterConfig,
}
"""The model of each part."""
CLUSTER = "cluster"
"""The part that jobs of every kind may have: what they get on Kubernetes."""
SUPERVISED_ONLY = (
    "use_chat_template", "system", "max_length", "truncation_strategy", "loss_scale", "response_prefix",
)  # fmt: skip
"""Keys of conversations that mean nothing in GRPO; `template` means the same there."""
DATASET_TYPES = {"pt": ("text", "auto"), "sft": ("instruction", "conversation", "auto")}
"""Types of datasets that a kind of job learns from."""

Sources: TypeAlias = Mapping[str, Document]
"""The files that the parts were read from, by the part's name."""
M = TypeVar("M", bound=ConfigModel)


@dataclass(frozen=True)
class SupervisedJob:
    """Next-token loss on data: pretraining on raw text (`pt`), or instructions and conversations, full or LoRA (`sft`).

    Attributes:
        kind: Which of the two.
        train: train.yaml.
        warnings: What the author should know, as `key: text`; no part of what makes jobs equal.
        cluster: cluster.yaml, None without one.
    """

    kind: Literal["pt", "sft"]
    train: TrainConfig
    warnings: list[str] = field(default_factory=list, compare=False)
    cluster: ClusterConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as `resolve_job` takes it, all keys set."""
        return _dumped(self.kind, train=self.train, cluster=self.cluster)


@dataclass(frozen=True)
class GrpoJob:
    """Reinforcement learning with group-relative advantages.

    Attributes:
        train: train.yaml; what the files share is the same in all three.
        infer: infer.yaml.
        orch: orch.yaml.
        warnings: What the author should know, as `key: text`; no part of what makes jobs equal.
        cluster: cluster.yaml, None without one.
    """

    train: TrainConfig
    infer: InferConfig
    orch: OrchConfig
    warnings: list[str] = field(default_factory=list, compare=False)
    cluster: ClusterConfig | None = None
    kind: Literal["grpo"] = "grpo"

    def to_dict(self) -> dict[str, Any]:
        """The configuration as `resolve_job` takes it, all keys set."""
        return _dumped(self.kind, train=self.train, infer=self.infer, orch=self.orch, cluster=self.cluster)


AnyJob: TypeAlias = SupervisedJob | GrpoJob


def _within(config: Any, *keys: str) -> Any:
    """A value deep in blocks; None where one of them is missing or no block."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _said_once(violations: Sequence[Violation], config: Mapping[str, Any]) -> list[Violation]:
    """Without those of values that were taken over from another file, where they are said of that file."""
    given = [_is_given(config, item.field) for item in violations]
    said = {item.description for item, is_given in zip(violations, given, strict=True) if is_given}
    return [item for item, is_given in zip(violations, given, strict=True) if is_given or item.description not in said]


def _is_given(config: Any, key: str) -> bool:
    """Whether the author wrote a dotted key, an index of a list being a part of it."""
    for part in key.split("."):
        if isinstance(config, list) and part.isdecimal() and int(part) < len(config):
            config = config[int(part)]
        elif isinstance(config, dict) and part in config:
            config = config[part]
        else:
            return False
    return True


def _dumped(kind: str, **parts: ConfigModel | None) -> dict[str, Any]:
    return {"kind": kind, **{name: part.model_dump(mode="json") for name, part in parts.items() if part is not None}}


def resolve_job(config: Mapping[str, Any], *, sources: Sources | None = None) -> AnyJob:
    """Resolves `{kind: pt|sft, train: {…}}` or `{kind: grpo, train: {…}, infer: {…}, orch: {…}}`, with `cluster: {…}`
    in each if the author wants.

    Args:
        config: The configuration, as of YAML files or of a google.protobuf.Struct.
        sources: The files of the parts, for `file:line` in messages.

    Raises:
        ConfigError: With all violations; their fields are keys such as `train.learning_rate`.
    """
    resolver = _Resolver(dict(sources or {}))
    try:
        return resolver.resolve(config)
    except _Refused:
        raise resolver.error() from None


class _Refused(Exception):  # noqa: N818 -- never leaves this module
    """There are violations."""


class _Resolver:
    """Collects violations and warnings on the way to a job."""

    def __init__(self, sources: dict[str, Document]) -> None:
        self.sources = sources
        self.violations: list[Violation] = []
        self.warnings: list[Violation] = []
        self.cluster: ClusterConfig | None = None

    def resolve(self, config: Mapping[str, Any]) -> AnyJob:
        kind = self.kind(config)
        self.check_parts(kind, config)
        self.violations += [item for name, part in config.items() if name != "kind" for item in unfit(part, name)]
        self.violations += unknown_homes(config)
        self.stop_if_wrong()
        config = self.spread(kind, config)
        self.cluster = self.part(CLUSTER, ClusterConfig, config[CLUSTER]) if config.get(CLUSTER) is not None else None
        if kind == "grpo":
            return self.grpo(config)
        data = config["train"]
        if kind == "pt" and isinstance(data, dict) and data.get("lora") is None:
            data = {**data, "lora": False}
        train = self.part("train", TrainConfig, data)
        if train is not None:
            self.check_datasets(kind, train)
            self.warn_of_grpo_keys(kind, data, train)
        self.stop_if_wrong()
        assert train is not None
        said = self.said()
        return SupervisedJob("pt" if kind == "pt" else "sft", train, said, self.cluster)

    def kind(self, config: Mapping[str, Any]) -> str:
        kind = config.get("kind")
        if not isinstance(kind, str) or kind not in PARTS:
            hint = nearest(kind, PARTS) if isinstance(kind, str) else ""
            self.wrong("kind", f"must be one of {', '.join(PARTS)}; got {shown(kind)}{hint}")
            raise _Refused
        return kind

    def check_parts(self, kind: str, config: Mapping[str, Any]) -> None:
        """Every part that the kind has, and no other."""
        for name in PARTS[kind]:
            given = config.get(name)
            if given is not None and not isinstance(given, dict):
                self.wrong(name, f"must be a mapping, the keys of {name}.yaml; got {shown(given)}")
            elif given is None:
                self.wrong(name, f"is required for a {kind} job: the keys of {name}.yaml")
        for name in config:
            if name == CLUSTER:
                if config[name] is not None and not isinstance(config[name], dict):
                    self.wrong(name, "must be a block: the keys of cluster.yaml")
            elif name != "kind" and name not in PARTS[kind]:
                self.wrong(name, f"is no part of a {kind} job, which has {', '.join(PARTS[kind])}")
        self.stop_if_wrong()

    def spread(self, kind: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The configuration with the numbers of nodes and replicas where the rest of it looks for them.

        What `cluster` sets and the other file leaves unset is taken from it; two that differ are an error.
        """
        parts = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
        nodes = _within(parts, CLUSTER, "trainer", "nodes")
        distributed = parts["train"].get("distributed") or {}
        if nodes is not None and isinstance(distributed, dict):
            parts["train"]["distributed"] = {"num_nodes": nodes, **distributed}
            other = parts["train"]["distributed"]["num_nodes"]
            self.same("cluster.trainer.nodes", nodes, "train.distributed.num_nodes", other)
        replicas = _within(parts, CLUSTER, "inference", "replicas")
        if kind == "grpo" and replicas is not None:
            self.same("cluster.inference.replicas", replicas, "infer.dp", parts["infer"].setdefault("dp", replicas))
        return parts

    def same(self, key: str, value: object, other_key: str, other: object) -> None:
        if value != other:
            self.wrong(key, f"is {shown(value)}, and {other_key} is {shown(other)}: set one of them only")

    def grpo(self, config: Mapping[str, Any]) -> GrpoJob:
        agreed = reconcile(config)
        self.violations += agreed.violations
        self.warnings += agreed.warnings
        train = self.part("train", TrainConfig, agreed.parts["train"])
        infer = self.part("infer", InferConfig, agreed.parts["infer"])
        orch = self.part("orch", OrchConfig, agreed.parts["orch"])
        self.violations = _said_once(self.violations, config)
        if train is not None:
            self.check_grpo_train(train)
        if train is not None and orch is not None and not orch.dump_metrics and (train.report_to or orch.report_to):
            self.wrong("orch.dump_metrics", "must be true with report_to: trackers are told what is in metrics.jsonl")
        if infer is not None and orch is not None and train is not None and not agreed.violations:
            self.check_capacity(train, infer, orch)
        self.stop_if_wrong()
        assert train is not None and infer is not None and orch is not None
        return GrpoJob(train, infer, orch, self.said(), self.cluster)

    def part(self, name: str, model: type[M], data: Any) -> M | None:
        """A validated part; None after noting what is wrong with it."""
        found: list[Violation] = []
        try:
            return model.model_validate(data, context={"warnings": found})
        except ValidationError as error:
            self.violations += [self.belongs_elsewhere(name, item) for item in violations_of(error, name)]
            return None
        finally:
            self.warnings += [Violation(f"{name}.{item.field}", item.description) for item in found]

    def belongs_elsewhere(self, name: str, violation: Violation) -> Violation:
        """Says of an unknown key which other file has it."""
        key = violation.field.removeprefix(f"{name}.")
        others = [other for other, model in MODELS.items() if other != name and key in model.model_fields]
        if not others or not violation.description.startswith("unknown key"):
            return violation
        return Violation(violation.field, f"unknown key: it belongs in {' or '.join(others)}.yaml")

    def check_datasets(self, kind: str, train: TrainConfig) -> None:
        if not train.datasets:
            self.wrong("train.datasets", f"must have an entry: {kind} learns from data")
        allowed = DATASET_TYPES[kind]
        for key in ("datasets", "validation_datasets"):
            for index, dataset in enumerate(getattr(train, key) or []):
                if dataset.type not in allowed:
                    text = f"is {dataset.type}, and a {kind} job takes {', '.join(allowed)}"
                    self.wrong(f"train.{key}.{index}.type", text)

    def warn_of_grpo_keys(self, kind: str, data: Mapping[str, Any], train: TrainConfig) -> None:
        for key in GRPO_ONLY:
            if key in data and getattr(train, key) != TrainConfig.model_fields[key].default:
                self.warnings.append(Violation(f"train.{key}", f"has no effect in a {kind} job, only in GRPO"))

    def check_grpo_train(self, train: TrainConfig) -> None:
        for key in SUPERVISED_ONLY:
            if getattr(train, key) != TrainConfig.model_fields[key].default:
                text = "has no effect in GRPO, whose prompts and answers are not those of datasets"
                self.warnings.append(Violation(f"train.{key}", text))
        if train.datasets or train.validation_datasets:
            key = "datasets" if train.datasets else "validation_datasets"
            self.wrong(f"train.{key}", "must be empty in GRPO: prompts come from env in orch.yaml")
        if train.max_steps < 1:
            self.wrong("train.max_steps", "is required, here or as max_steps of orch.yaml: GRPO has no epochs")
        if train.adapter_path is not None:
            text = "cannot be used in GRPO, where sampler and trainer share a base: merge the adapter into it first"
            self.wrong("train.adapter_path", text)
        for key in ("early_stop", "epoch_adjustment"):
            if getattr(train, key):
                self.wrong(f"train.{key}", "is for PT and SFT: a GRPO job ends after max_steps")
        if train.recipe != "bf16":
            self.wrong("train.recipe", f"{train.recipe} is for PT and SFT: inference would compute otherwise; use bf16")
        self.check_loss(train.loss.root, train.lora)

    def check_loss(self, loss: IpoLoss | AipoLoss | DppoLoss | ClipLoss, lora: bool) -> None:
        if not isinstance(loss, ClipLoss) and loss.teacher_tau:
            self.wrong("train.loss.teacher_tau", f"needs a teacher model, which is {NOT_YET}: leave it at 0")
        if isinstance(loss, ClipLoss) and loss.beta and not lora:
            text = "needs lora: true, because the reference is the model without its adapter: leave it at 0"
            self.wrong("train.loss.beta", text)

    def check_capacity(self, train: TrainConfig, infer: InferConfig, orch: OrchConfig) -> None:
        """What is sampled and trained fits into what samples it."""
        if infer.max_model_len is not None and infer.max_model_len < orch.seq_len:
            self.wrong("infer.max_model_len", f"is {infer.max_model_len}, less than orch.seq_len ({orch.seq_len})")
        rank = infer.max_lora_rank
        if train.lora and infer.enable_lora and rank is not None and rank < train.lora_rank:
            self.wrong("infer.max_lora_rank", f"is {rank}, less than train.lora_rank ({train.lora_rank})")

    def wrong(self, key: str, text: str) -> None:
        self.violations.append(Violation(key, text))

    def stop_if_wrong(self) -> None:
        if self.violations:
            raise _Refused

    def said(self) -> list[str]:
        return list(dict.fromkeys(str(item) for item in self.warnings))

    def place(self, key: str) -> str:
        """`file:line` of a key, empty if unknown."""
        part, _, rest = key.partition(".")
        source = self.sources.get(part)
        return source.where(rest) if source is not None else ""

    def error(self) -> ConfigError:
        lines = [f"{place}: {item}" if (place := self.place(item.field)) else str(item) for item in self.violations]
        return ConfigError("\n".join(lines), violations=self.violations)
