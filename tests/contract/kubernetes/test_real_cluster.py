"""What only a real API server can say: of the manifests that we ship, of the definition of TrainingJobs, of the
orchestrator's role, and of both traps of deletion. `make test-cluster` runs this, and the other tests of the launcher
and of TrainingJobs on the same server."""

from __future__ import annotations

import asyncio
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("kubernetes", reason="needs the extra `kubernetes`")

from orchestrator_svc.launchers.kubernetes.answers import ExpiredError
from orchestrator_svc.launchers.kubernetes.api import CONFIG_MAP, JOB, Api, Kind
from surogate.errors import PermissionDeniedError
from tests.helpers.cluster.kube import TEMPLATE
from tests.helpers.cluster.kube_cluster import GIVEN, NOT_GIVEN, OLDEST, Object, RealCluster
from tests.helpers.cluster.kube_real import ACCOUNT, install_role
from tests.helpers.manifests.objects import CLUSTER_KINDS
from tests.helpers.manifests.shipped import KUSTOMIZATIONS, NO_KUBECTL, ROOT, cluster
from tests.helpers.orchestrator import sft_config
from tests.unit.kubernetes.test_manifests_launcher import objects_of_a_job

if not GIVEN:
    pytest.skip(NOT_GIVEN, allow_module_level=True)

APPLY = "application/apply-patch+yaml"
DRY = "?dryRun=All&fieldValidation=Strict&fieldManager=surogate-test"
WITH_PODS, WITH_PORTS = frozenset({"Deployment", "StatefulSet", "Job"}), frozenset({"Service", "NetworkPolicy"})


class Namespace:
    """A namespace like the one that we ship, and calls to it by whoever may do everything."""

    def __init__(self, real: RealCluster) -> None:
        self.real = real
        self.name = f"surogate-test-{secrets.token_hex(3)}"
        self._plurals: dict[tuple[str, str], str] = {}

    def call(self, method: str, url: str, body: Any = None, content: str = "application/json") -> Object:
        """What is answered to a call that must succeed, and without a warning."""
        status, answer, told = self.real.request(method, url, body, content)
        assert status < 400, answer.get("message", answer)
        assert told == [], told
        return answer

    def url(self, version: str, kind: str, name: str = "") -> str:
        """Where objects of a kind are; empty if the server does not know the kind."""
        root = f"{self.real.url}/{'apis' if '/' in version else 'api'}/{version}"
        if (version, kind) not in self._plurals:
            _, found, _ = self.real.request("GET", root)
            kinds = {one["kind"]: one["name"] for one in found.get("resources") or [] if "/" not in one["name"]}
            self._plurals[version, kind] = kinds.get(kind, "")
        plural = self._plurals[version, kind]
        where = "" if kind in CLUSTER_KINDS else f"/namespaces/{self.name}"
        return f"{root}{where}/{plural}{f'/{name}' if name else ''}" if plural else ""

    def create(self, body: Object, query: str = "") -> Object:
        """Creates an object."""
        return self.call("POST", self.url(body["apiVersion"], body["kind"]) + query, body)

    def refusal(self, body: Object) -> str:
        """Why an object is refused."""
        url = self.url(body["apiVersion"], body["kind"]) + DRY
        status, answer, _ = self.real.request("POST", url, body)
        assert status in {400, 422}, answer
        return str(answer["message"])

    def exists(self, kind: str, name: str) -> bool:
        """Whether there is an object of API group v1, and not about to go."""
        status, found, _ = self.real.request("GET", self.url("v1", kind, name))
        return status == 200 and not found["metadata"].get("deletionTimestamp")


@pytest.fixture
def namespace(real_cluster: RealCluster) -> Iterator[Namespace]:
    made = Namespace(real_cluster)
    shipped = yaml.safe_load((ROOT / "k8s" / "base" / "namespace.yaml").read_text())
    real_cluster.make_namespace(made.name, shipped["metadata"]["labels"])
    install_role(real_cluster, made.name)
    yield made
    real_cluster.delete_namespace(made.name)


def until(met: Callable[[], bool], seconds: float = 30.0) -> None:
    """Waits for what controllers do in their own time."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, f"not so within {seconds:g} s"
        time.sleep(0.1)


def known(namespace: Namespace, objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    """The objects that the server knows the kinds of, each with its URL; the others are named in a warning."""
    left_out = set()
    for body in objects:
        kind = body["kind"]
        if kind not in CLUSTER_KINDS:
            body["metadata"]["namespace"] = namespace.name
        url = namespace.url(body["apiVersion"], kind, body["metadata"]["name"])
        if not url:
            left_out.add(f"{body['apiVersion']} {kind}")
        elif kind in WITH_PODS and namespace.real.minor < OLDEST:
            left_out.add(f"{kind} (its probes and hooks are not of 1.{namespace.real.minor})")
        elif namespace.real.minor < OLDEST and kind in WITH_PORTS:
            left_out.add(f"{kind} (1.{namespace.real.minor} applies no ports without a protocol)")
        else:
            yield url, body
    if left_out:
        warnings.warn(f"not tried, the server does not know them: {', '.join(sorted(left_out))}", stacklevel=1)


@pytest.mark.skipif(bool(NO_KUBECTL), reason=NO_KUBECTL or "kubectl is there")
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_what_we_ship_is_taken_as_it_is(namespace: Namespace, name: str, tmp_path: Path) -> None:
    """Server-side apply of everything, and of the objects of a job, in dry run: no error, no warning."""
    shown = cluster(name)
    for url, body in known(namespace, [*shown.objects, *objects_of_a_job(shown, tmp_path)]):
        namespace.call("PATCH", f"{url}{DRY}&force=true", body, APPLY)


@pytest.mark.skipif(bool(NO_KUBECTL), reason=NO_KUBECTL or "kubectl is there")
@pytest.mark.parametrize("name", ["overlays/cpu-kind", "overlays/gpu-multinode"])
def test_applying_the_same_again_changes_nothing(namespace: Namespace, name: str) -> None:
    """As GitOps does all the time: a second apply writes nothing, and what it would write is what is there."""
    mine = [one for one in cluster(name).objects if one["kind"] not in CLUSTER_KINDS]
    tried = 0
    for url, body in known(namespace, mine):
        query = "?fieldManager=surogate-test&fieldValidation=Strict&force=true"
        first = namespace.call("PATCH", url + query, body, APPLY)
        if body["kind"] in WITH_PODS | {"PersistentVolumeClaim"}:
            first = without_status(first)  # controllers write there meanwhile
        again = namespace.call("PATCH", f"{url}{query}&dryRun=All", body, APPLY)
        if body["kind"] in WITH_PODS | {"PersistentVolumeClaim"}:
            again = without_status(again)
        assert again == first
        tried += 1
    assert tried > 5


def without_status(one: Object) -> Object:
    kept = {key: value for key, value in one.items() if key != "status"}
    return {
        **kept,
        "metadata": {key: one["metadata"].get(key) for key in ("name", "labels", "annotations", "generation")},
    }


@pytest.mark.skipif(bool(NO_KUBECTL), reason=NO_KUBECTL or "kubectl is there")
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_all_pods_are_admitted(namespace: Namespace, name: str, tmp_path: Path) -> None:
    """By the restricted standard, which a Deployment or a Job passes whatever is in its template."""
    if namespace.real.minor < OLDEST:
        pytest.skip(f"Kubernetes 1.{namespace.real.minor} knows not all of our pods' fields: 1.{OLDEST} is the oldest")
    shown = cluster(name)
    made = [one for one in [*shown.objects, *objects_of_a_job(shown, tmp_path)] if one["kind"] in WITH_PODS]
    for i, owner in enumerate(made):
        template = owner["spec"]["template"]
        metadata = {"name": f"pod-{i}", "labels": template["metadata"]["labels"]}
        namespace.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}, DRY)


def training_job(spec: Object, name: str = "one") -> Object:
    return {"apiVersion": "surogate.dev/v1alpha1", "kind": "TrainingJob", "metadata": {"name": name}, "spec": spec}


@pytest.mark.parametrize("file", ["sft.yaml", "grpo.yaml"])
def test_the_examples_are_taken(namespace: Namespace, file: str) -> None:
    namespace.create(yaml.safe_load((ROOT / "k8s" / "examples" / file).read_text()), DRY)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({**sft_config(), "kind": "dpo"}, 'spec.kind: Unsupported value: "dpo"'),
        ({"kind": "sft"}, "spec.train: Required value"),
        (sft_config(lora_rank=0), "spec.train.lora_rank in body should be greater than or equal to 1"),
        (sft_config(learning_rate=True), "spec.train.learning_rate in body must be of type number"),
        ({**sft_config(), "inferenceReplicas": 0}, "spec.inferenceReplicas in body should be greater than or equal"),
    ],
)
def test_what_no_job_could_be_is_refused_by_its_field(namespace: Namespace, spec: Object, why: str) -> None:
    assert why in namespace.refusal(training_job(spec))


def test_a_training_job_has_columns_and_a_scale(namespace: Namespace) -> None:
    url = namespace.url("surogate.dev/v1alpha1", "TrainingJob")
    namespace.create(training_job({**sft_config(), "inferenceReplicas": 2}))
    status = {"state": "Running", "step": 3, "maxSteps": 5, "message": "training", "inferenceReplicas": 1}
    merge = "application/merge-patch+json"
    namespace.call("PATCH", f"{url}/one/status", {"status": {**status, "selector": "a=b"}}, merge)
    _, table, _ = namespace.real.request("GET", url, accept="application/json;as=Table;v=v1;g=meta.k8s.io")
    names = [column["name"] for column in table["columnDefinitions"]]
    [row] = table["rows"]
    shown = dict(zip(names, row["cells"], strict=True))
    assert [shown[name] for name in ("Name", "Kind", "State", "Step", "Steps")] == ["one", "sft", "Running", 3, 5]
    scale = namespace.call("PATCH", f"{url}/one/scale", {"spec": {"replicas": 4}}, merge)
    assert (scale["spec"]["replicas"], scale["status"]) == (4, {"replicas": 1, "selector": "a=b"})
    assert namespace.call("GET", f"{url}/one")["spec"]["inferenceReplicas"] == 4


async def test_a_watch_from_a_forgotten_version_says_so(real_cluster: RealCluster, namespace: Namespace) -> None:
    api = Api(namespace.name, kubeconfig=real_cluster.kubeconfig, patience=5.0)
    await api.open()
    try:
        with pytest.raises(ExpiredError, match="too old"):
            async with asyncio.timeout(20):
                async for _ in api.watch(CONFIG_MAP, "1"):
                    pass
    finally:
        await api.close()


async def test_the_orchestrators_own_account_gets_in_from_a_pod(
    real_cluster: RealCluster, namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the token, the certificate and the variables that a pod has."""
    account = namespace.url("v1", "ServiceAccount", ACCOUNT)
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = namespace.call("POST", f"{account}/token", body)["status"]["token"]
    (tmp_path / "token").write_text(token)
    host, _, port = real_cluster.url.removeprefix("https://").partition(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port or "443")
    loaded = "kubernetes.config.incluster_config.SERVICE_"
    monkeypatch.setattr(f"{loaded}TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(f"{loaded}CERT_FILENAME", real_cluster.authority)
    api = Api(namespace.name)
    await api.open()
    try:
        made = await api.create(CONFIG_MAP, {"metadata": {"name": "mine"}, "data": {"a": "b"}})
        await api.delete(CONFIG_MAP, "mine", made["metadata"]["uid"])
        with pytest.raises(PermissionDeniedError, match=f"serviceaccount:{namespace.name}:{ACCOUNT}"):
            await api.list(Kind("Secret", "v1", "secrets"))
    finally:
        await api.close()


@pytest.mark.parametrize(
    ("query", "body"), [("", None), ("?propagationPolicy=Background", {"kind": "DeleteOptions", "apiVersion": "v1"})]
)
async def test_a_job_that_is_deleted_without_a_policy_leaves_its_pods(
    real_cluster: RealCluster, namespace: Namespace, query: str, body: Object | None
) -> None:
    """Both traps, as they are on this server, and the launcher's own deletion, which does not walk into them."""
    if not real_cluster.collects:
        pytest.skip("KUBEBUILDER_ASSETS has no kube-controller-manager: nobody collects what owners leave")
    spec = {**TEMPLATE["spec"], "restartPolicy": "Never"}
    spec["containers"] = [{**spec["containers"][0], "securityContext": CONTAINER}]
    spec["securityContext"] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    for name in ("trap", "launcher"):
        template = {"metadata": {"labels": {"name": name}}, "spec": spec}
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}}
        made = namespace.create({**job, "spec": {"parallelism": 0, "template": template}})
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": made["metadata"]["uid"]}
        metadata = {"name": f"pod-of-{name}", "ownerReferences": [owner]}
        until(lambda: namespace.exists("ServiceAccount", "default"))
        namespace.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    trap = namespace.url("batch/v1", "Job", "trap")
    namespace.call("DELETE", trap + query, body)
    until(lambda: real_cluster.request("GET", trap)[0] == 404)
    left = namespace.call("GET", namespace.url("v1", "Pod", "pod-of-trap"))
    assert not left["metadata"].get("ownerReferences"), "it is orphaned: nobody will collect it"
    api = Api(namespace.name, kubeconfig=real_cluster.kubeconfig)
    await api.open()
    await api.delete(JOB, "launcher", (await api.get(JOB, "launcher"))["metadata"]["uid"])
    await api.close()
    await asyncio.to_thread(until, lambda: not namespace.exists("Pod", "pod-of-launcher"))
    assert namespace.exists("Pod", "pod-of-trap")


CONTAINER = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize(
    ("verb", "group", "resource", "elsewhere"),
    [
        ("get", "", "secrets", ""),
        ("create", "", "pods/exec", ""),
        ("create", "", "serviceaccounts/token", ""),
        ("create", "rbac.authorization.k8s.io", "roles", ""),
        ("delete", "surogate.dev", "trainingjobs", ""),
        ("list", "", "pods", "default"),
    ],
)
def test_the_role_allows_no_more(namespace: Namespace, verb: str, group: str, resource: str, elsewhere: str) -> None:
    plural, _, part = resource.partition("/")
    where = {"namespace": elsewhere or namespace.name, "verb": verb, "group": group, "resource": plural}
    spec = {"user": f"system:serviceaccount:{namespace.name}:{ACCOUNT}"}
    body = {"spec": {**spec, "resourceAttributes": {**where, "subresource": part}}}
    review = namespace.call("POST", f"{namespace.real.url}/apis/authorization.k8s.io/v1/subjectaccessreviews", body)
    assert not review["status"]["allowed"]
