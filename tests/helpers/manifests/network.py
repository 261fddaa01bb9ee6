"""Network policies: named edges alone, each of which leads from somewhere to somewhere and is open at both ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.helpers.manifests.objects import Cluster, Object, Pod, name_of, selects

_OTHERS = frozenset({"surogate.dev/client"})
"""Labels of pods that somebody else makes in this namespace: clients."""


def everything_is_denied_first(cluster: Cluster) -> Iterator[str]:
    """One policy selects all pods, for both directions, and allows nothing."""
    for one in cluster.of("NetworkPolicy"):
        spec = one["spec"]
        both = set(spec.get("policyTypes") or []) == {"Ingress", "Egress"}
        if spec["podSelector"] == {} and both and not spec.get("ingress") and not spec.get("egress"):
            return
    yield "no NetworkPolicy denies everything that no other allows"


def edges_select_something(cluster: Cluster) -> Iterator[str]:
    """Both ends of an edge within the namespace are pods that there are, and its ports are theirs."""
    pods = list(cluster.pods())
    for one in cluster.of("NetworkPolicy"):
        spec = one["spec"]
        mine = [pod for pod in pods if selects(spec["podSelector"], pod.labels)]
        if not mine:
            yield f"{name_of(one)}: podSelector selects nothing"
        for rule in spec.get("ingress") or []:
            yield from _peers(one, rule.get("from") or [], pods)
            yield from _ports(one, rule, mine)
        for rule in spec.get("egress") or []:
            yield from _peers(one, rule.get("to") or [], pods)
            for peer in rule.get("to") or []:
                if _is_local(peer):
                    yield from _ports(one, rule, [pod for pod in pods if selects(peer["podSelector"], pod.labels)])


def edges_are_open_at_both_ends(cluster: Cluster) -> Iterator[str]:
    """What may be called within the namespace may be answered, and the other way round."""
    leaving, entering = set(_edges(cluster, "egress")), set(_edges(cluster, "ingress"))
    for source, target, port in sorted(leaving - entering, key=str):
        yield f"{source} may call {target} on {port}, which does not let it in"
    for source, target, port in sorted(entering - leaving, key=str):
        yield f"{target} lets {source} in on {port}, which may not call it"


RULES = (everything_is_denied_first, edges_select_something, edges_are_open_at_both_ends)


def _is_local(peer: Object) -> bool:
    return "podSelector" in peer and "namespaceSelector" not in peer


def _peers(policy: Object, peers: list[Object], pods: list[Pod]) -> Iterator[str]:
    for peer in peers:
        wanted = (peer.get("podSelector") or {}).get("matchLabels") or {}
        local = _is_local(peer) and not _OTHERS & wanted.keys()
        if local and not any(selects(peer["podSelector"], pod.labels) for pod in pods):
            yield f"{name_of(policy)}: an edge leads to {peer['podSelector']}, which selects nothing"


def _ports(policy: Object, rule: Object, pods: list[Pod]) -> Iterator[str]:
    """A service of somebody's own need not have every port that those of its kind have: metrics, for one."""
    for port in rule.get("ports") or []:
        if pods and not any(port["port"] in _known(pod) for pod in pods):
            yield f"{name_of(policy)}: {' and '.join(pod.where for pod in pods)} have no port {port['port']}"


def _known(pod: Pod) -> dict[Any, int]:
    """Ports of a pod, by name and number."""
    ports = [port for container in pod.containers() for port in container.get("ports") or []]
    return {key: port["containerPort"] for port in ports for key in (port["name"], port["containerPort"])}


def _edges(cluster: Cluster, direction: str) -> Iterator[tuple[str, str, int | None]]:
    """(source, target, port) of all edges between pods of the namespace; port None is all."""
    pods = list(cluster.pods())
    side = "from" if direction == "ingress" else "to"
    for one in cluster.of("NetworkPolicy"):
        mine = [pod for pod in pods if selects(one["spec"]["podSelector"], pod.labels)]
        for rule in one["spec"].get(direction) or []:
            local = [peer["podSelector"] for peer in rule.get(side) or [] if _is_local(peer)]
            others = [pod for pod in pods if any(selects(selector, pod.labels) for selector in local)]
            for here, there in ((a, b) for a in mine for b in others):
                source, target = (there, here) if direction == "ingress" else (here, there)
                for port in rule.get("ports") or [None]:
                    number = None if port is None else _known(target).get(port["port"])
                    yield source.where, target.where, number
