"""Rules for rendered Kubernetes manifests: what their schemas cannot say, and what the API server, or nobody, would."""

from __future__ import annotations

from dataclasses import dataclass

from tests.helpers.manifests import access, network, pods, references, resources, workloads
from tests.helpers.manifests.objects import Cluster, Rule

RULES: tuple[Rule, ...] = (
    *resources.RULES,
    *pods.RULES,
    *workloads.RULES,
    *references.RULES,
    *network.RULES,
    *access.RULES,
)


@dataclass(frozen=True)
class Finding:
    """What a rule has against an object."""

    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


def check(cluster: Cluster) -> list[Finding]:
    """What all the rules find."""
    return [Finding(rule.__name__, text) for rule in RULES for text in rule(cluster)]
