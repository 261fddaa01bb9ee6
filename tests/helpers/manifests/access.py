"""Access to the API: least privilege, and tokens only where they are used."""

from __future__ import annotations

from collections.abc import Iterator

from tests.helpers.manifests.objects import Cluster, name_of

_FORBIDDEN = frozenset({"*", "secrets", "pods/exec", "pods/attach", "serviceaccounts/token", "roles", "rolebindings"})
_FORBIDDEN_VERBS = frozenset({"*", "escalate", "bind", "impersonate", "deletecollection"})
_ENFORCE = "pod-security.kubernetes.io/enforce"


def roles_are_narrow(cluster: Cluster) -> Iterator[str]:
    """No wildcards, no Secrets, no way to more rights, nothing beyond the namespace."""
    for one in cluster.of("ClusterRole", "ClusterRoleBinding"):
        yield f"{name_of(one)}: it reaches beyond the namespace"
    for one in cluster.of("Role"):
        for rule in one["rules"]:
            wrong = _FORBIDDEN & {*rule["resources"], *rule["apiGroups"]} | _FORBIDDEN_VERBS & {*rule["verbs"]}
            if wrong:
                yield f"{name_of(one)}: it allows {', '.join(sorted(wrong))}"


def tokens_are_mounted_where_needed(cluster: Cluster) -> Iterator[str]:
    """A pod says whether it gets a token for the API server; only one whose account has a role may."""
    for one in cluster.of("ServiceAccount"):
        if one.get("automountServiceAccountToken") is not False:
            yield f"{name_of(one)}: its token is mounted into every pod that does not refuse it"
    bound = {subject["name"] for one in cluster.of("RoleBinding") for subject in one["subjects"]}
    for pod in cluster.pods():
        mounts, account = pod.spec.get("automountServiceAccountToken"), pod.spec.get("serviceAccountName")
        if mounts is None:
            yield f"{pod.where}: it does not say whether a token is mounted"
        elif mounts and account not in bound:
            yield f"{pod.where}: it has a token of {account}, which has no role"


def namespaces_are_restricted(cluster: Cluster) -> Iterator[str]:
    """The API server itself holds pods to the restricted standard."""
    for one in cluster.of("Namespace"):
        if (one["metadata"].get("labels") or {}).get(_ENFORCE) != "restricted":
            yield f"{name_of(one)}: the label {_ENFORCE} is not restricted"


RULES = (roles_are_narrow, tokens_are_mounted_where_needed, namespaces_are_restricted)
