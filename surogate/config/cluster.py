"""cluster.yaml, the `cluster` part of a job: what its pods get on Kubernetes. Elsewhere it means nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from surogate.config.base import ConfigModel, Devices, Size, Text, fail, problem, refuse, shown

CLUSTER_COMPONENTS = ("trainer", "inference", "reward")
"""The components that have pods of their own."""

_QUANTITY = re.compile(r"^(?:\d+(?:\.\d+)?|\.\d+)(?:[numkMGTPE]|[KMGTPE]i|[eE][+-]?\d+)?$")
_ENVIRONMENT = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_NAME = re.compile(r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")
_LABEL_VALUE = re.compile(r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")
_LABEL_KEY = re.compile(
    r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$",
)
_RESOURCE_KEY = re.compile(r"^([a-z0-9][a-z0-9.-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*$")


def _quantity(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = repr(value)
    if not isinstance(value, str) or not _QUANTITY.fullmatch(value):
        raise fail(f"must be a quantity such as 4, 500m or 16Gi; got {shown(value)}")
    return value


def _matching(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise fail(f"must be {what}, got {shown(value)}")
        return value

    return AfterValidator(check)


Quantity: TypeAlias = Annotated[str, BeforeValidator(_quantity)]
"""A Kubernetes quantity; numbers become strings, which every client takes."""
ObjectName: TypeAlias = Annotated[str, _matching(_NAME, "a Kubernetes name: lowercase letters, digits, - and .")]
LabelKey: TypeAlias = Annotated[str, _matching(_LABEL_KEY, "a label key such as example.com/pool")]
LabelValue: TypeAlias = Annotated[
    str, _matching(_LABEL_VALUE, "a label value of at most 63 letters, digits, -, _ and .")
]
ResourceName: TypeAlias = Annotated[str, _matching(_RESOURCE_KEY, "a resource such as memory or nvidia.com/gpu")]
VariableName: TypeAlias = Annotated[str, _matching(_ENVIRONMENT, "the name of an environment variable")]


def _mount_path(value: str) -> str:
    parts = value.split("/")
    if not value.startswith("/") or value == "/" or ":" in value or {".", ".."} & set(parts):
        raise fail(f"must be an absolute path below /, without `..` and `:`; got {shown(value)}")
    return value.rstrip("/")


def _sub_path(value: str) -> str:
    if value.startswith("/") or ".." in value.split("/"):
        raise fail(f"must be a relative path without `..`, got {shown(value)}")
    return value


class Resources(ConfigModel):
    """Resources of a worker, as in a pod's manifest."""

    block: ClassVar[str] = "resources."

    requests: dict[ResourceName, Quantity] = Field({})
    """What a node must have free: `cpu`, `memory`, `ephemeral-storage` or another resource, with its quantity."""
    limits: dict[ResourceName, Quantity] = Field({})
    """What it may use at most. A container that uses more memory is killed."""


class Toleration(ConfigModel):
    """A taint of nodes that the pods put up with."""

    block: ClassVar[str] = "tolerations."

    key: LabelKey
    """Key of the taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """`Exists` = any value, `Equal` = the one in `value`."""
    value: LabelValue | None = None
    """Value of the taint, with `operator: Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. null = all."""

    @model_validator(mode="after")
    def _value_with_equal(self) -> Self:
        if (self.operator == "Equal") != (self.value is not None):
            refuse("tolerations", [problem("value", "goes with `operator: Equal`, and only with it")])
        return self


class SecretVariable(ConfigModel):
    """An environment variable whose value is in a Secret of the cluster."""

    block: ClassVar[str] = "secrets."

    env: VariableName
    """Name of the variable."""
    name: ObjectName
    """Name of the Secret; the orchestrator's `allowed_secrets` must have it."""
    key: Text
    """Key within the Secret."""


class EmptyDir(ConfigModel):
    """A folder that is empty when the pod starts and goes with it."""

    block: ClassVar[str] = "empty_dir."

    size_limit: Quantity | None = None
    """Most that it may hold, for example 20Gi. null = what the node has."""
    memory: bool = False
    """Keep it in memory; it then counts against the memory limit."""


class Volume(ConfigModel):
    """A folder that is mounted into the pods of a component: exactly one of `pvc`, `config_map` and `empty_dir`."""

    block: ClassVar[str] = "volumes."
    renamed: ClassVar[Mapping[str, str]] = {
        "mountPath": "mount_path",
        "subPath": "sub_path",
        "readOnly": "read_only",
        "configMap": "config_map",
        "emptyDir": "empty_dir",
    }

    mount_path: Annotated[Text, AfterValidator(_mount_path)]
    """Where it is mounted: below one of the orchestrator's `allowed_mount_roots` (/data, /models, /outputs)."""
    sub_path: Annotated[Text, AfterValidator(_sub_path)] | None = None
    """Folder within the volume. null = its root."""
    read_only: bool = False
    """Mount it for reading only."""
    pvc: ObjectName | None = None
    """Name of a PersistentVolumeClaim; the orchestrator's `allowed_claims` must have it."""
    config_map: ObjectName | None = None
    """Name of a ConfigMap; the orchestrator's `allowed_config_maps` must have it."""
    empty_dir: EmptyDir | None = None
    """An empty folder; `{}` for one without a limit."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [name for name in ("pvc", "config_map", "empty_dir") if getattr(self, name) is not None]
        if len(sources) != 1:
            refuse("volumes", [problem("mount_path", "needs exactly one of `pvc`, `config_map` and `empty_dir`")])
        return self


class PodConfig(ConfigModel):
    """The pods of one component."""

    renamed: ClassVar[Mapping[str, str]] = {"nodeSelector": "node_selector"}

    image: Text | None = None
    """Image of the worker; the orchestrator's `allowed_images` must match it. null = the template's."""
    gpus: Devices | None = None
    """GPUs of a pod, 0 to 1,024. null = what the rest of the job asks for (`train.gpus`, `infer.tp`), else the
    template's.
    """
    resources: Resources = Resources()
    """CPU, memory and other resources of the worker's container, over those of the template."""
    node_selector: dict[LabelKey, LabelValue] = Field({})
    """Labels that a node must have, beside those of the template and of `cluster.node_selector`."""
    tolerations: list[Toleration] = Field([])
    """Taints that its pods tolerate, beside those of the template and of `cluster.tolerations`."""
    volumes: list[Volume] = Field([])
    """Folders to mount."""
    secrets: list[SecretVariable] = Field([])
    """Environment variables from Secrets."""
    env: dict[VariableName, str] = Field({})
    """Environment variables. Those of the template and of the services themselves cannot be replaced."""


class TrainerPods(PodConfig):
    """The trainer's pods: one a node."""

    block: ClassVar[str] = "trainer."

    nodes: Annotated[Devices, Field(ge=1)] | None = None
    """Nodes to train on, 1 to 1,024: the same as `distributed.num_nodes` of train.yaml. null = that."""


class InferencePods(PodConfig):
    """The inference pods: one a replica."""

    block: ClassVar[str] = "inference."

    replicas: Annotated[Devices, Field(ge=1)] | None = None
    """Replicas, 1 to 1,024: the same as `dp` of infer.yaml. null = that."""


class RewardPods(PodConfig):
    """The pod of the built-in reward service, and those of `env[].image`."""

    block: ClassVar[str] = "reward."


class ClusterConfig(ConfigModel):
    """cluster.yaml, every key as an attribute of that name."""

    renamed: ClassVar[Mapping[str, str]] = {
        "nodeSelector": "node_selector",
        "priorityClass": "priority_class",
        "priorityClassName": "priority_class",
    }

    queue: LabelValue | None = None
    """Kueue's LocalQueue: the workers wait there, suspended, until there is quota. null = start at once."""
    priority_class: ObjectName | None = None
    """PriorityClass of all pods; the orchestrator's `allowed_priority_classes` must have it. null = the template's."""
    node_selector: dict[LabelKey, LabelValue] = Field({})
    """Labels that the nodes of all pods must have."""
    tolerations: list[Toleration] = Field([])
    """Taints that all pods tolerate."""
    max_runtime: Size | None = None
    """Seconds after which a worker is ended and the job fails, ≥ 1. null = never."""
    trainer: TrainerPods = TrainerPods()
    """The trainer's pods."""
    inference: InferencePods = InferencePods()
    """The inference pods."""
    reward: RewardPods = RewardPods()
    """The reward pods."""

    def pods(self, component: str) -> PodConfig:
        """The pods of a component."""
        found: PodConfig = getattr(self, component)
        return found

    def components(self) -> Iterator[tuple[str, PodConfig]]:
        """All components with their pods."""
        return ((name, self.pods(name)) for name in CLUSTER_COMPONENTS)
