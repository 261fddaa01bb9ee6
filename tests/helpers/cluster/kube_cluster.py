"""The real cluster that tests are given, by KUBECONFIG or KUBEBUILDER_ASSETS, and raw calls to it."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import aiohttp

from orchestrator_svc.trainingjobs.crd import definition
from tests.helpers.cluster.control_plane import JOBS_AS_WE_MAKE_THEM, control_plane, missing

Object = dict[str, Any]

CHOSEN = "SUROGATE_TEST_CLUSTER"
"""Variable that says that tests may use the cluster of KUBECONFIG: many people have that set, to one that they need."""
ASSETS = os.environ.get("KUBEBUILDER_ASSETS", "")
KUBECONFIG = os.environ.get("KUBECONFIG", "") if os.environ.get(CHOSEN) else ""
GIVEN = bool(KUBECONFIG or ASSETS)
NOT_GIVEN = (
    "no cluster: `make test-cluster` with KUBECONFIG, or with KUBEBUILDER_ASSETS, a folder with etcd and kube-apiserver"
)
_JSON = "application/json"
OLDEST = 33
"""Minor version of the oldest Kubernetes that the manifests are for (k8s/README.md)."""
STRICT = 27
"""Minor version from which API servers validate fields strictly when they are asked to."""


class RealCluster:
    """An API server that is really one.

    Attributes:
        kubeconfig: Who may do everything.
        url: Where it is.
        authority: File with the certificate of who vouches for it.
        minor: Its minor version.
        collects: Whether Kubernetes' garbage collector runs.
        runs_jobs: Whether Kubernetes' own Job controller does, and knows all that the launcher's Jobs say.
    """

    def __init__(self, kubeconfig: Path, *, has_controllers: bool = True) -> None:
        from kubernetes import client, config

        self.kubeconfig = kubeconfig
        self._settings: Any = client.Configuration()
        config.load_kube_config(config_file=str(kubeconfig), client_configuration=self._settings)
        self.url = str(self._settings.host)
        self.authority = str(self._settings.ssl_ca_cert)
        self._http = client.ApiClient(self._settings).rest_client.pool_manager
        _, version, _ = self.request("GET", f"{self.url}/version")
        self.minor = int("".join(filter(str.isdigit, version["minor"])))
        self.collects = has_controllers
        self.runs_jobs = has_controllers and self.minor >= JOBS_AS_WE_MAKE_THEM

    def request(
        self, method: str, url: str, body: Any = None, content: str = _JSON, accept: str = _JSON
    ) -> tuple[int, Object, list[str]]:
        """One call: the status, what was answered, and the warnings beside it."""
        data = None if body is None else json.dumps(body)
        headers = {**self._authorization, "Content-Type": content, "Accept": accept}
        answer = self._http.request(method, url, body=data, headers=headers, timeout=30)
        warnings = answer.headers.getlist("Warning")
        try:
            found = json.loads(answer.data)
        except ValueError:
            found = {"message": answer.data.decode(errors="replace")}
        return answer.status, found, warnings

    def session(self) -> aiohttp.ClientSession:
        """Calls as coroutines, with the same credentials."""
        settings = self._settings
        context = ssl.create_default_context(cafile=settings.ssl_ca_cert)
        if not settings.verify_ssl:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if settings.cert_file:
            context.load_cert_chain(settings.cert_file, settings.key_file)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        connector = aiohttp.TCPConnector(ssl=context, limit=0)
        options: Any = {"timeout": timeout, "connector": connector, "read_bufsize": 1 << 22}  # a watch's lines are long
        return aiohttp.ClientSession(headers=self._authorization, **options)

    def make_namespace(self, name: str, labels: dict[str, str]) -> None:
        """A namespace in which pods can be made."""
        body = {"metadata": {"name": name, "labels": labels}}
        status, answer, _ = self.request("POST", f"{self.url}/api/v1/namespaces", body)
        assert status == 201, answer

    def delete_namespace(self, name: str) -> None:
        """Deletes a namespace; what is in it goes in its own time."""
        self.request("DELETE", f"{self.url}/api/v1/namespaces/{name}", {"propagationPolicy": "Background"})

    def define_training_jobs(self) -> None:
        """The CustomResourceDefinition of TrainingJobs, as it is now."""
        url, body = f"{self.url}/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition()
        status, answer, _ = self.request("POST", url, body)
        if status == 409:
            name = body["metadata"]["name"]
            status, answer, _ = self.request("PATCH", f"{url}/{name}", body, "application/merge-patch+json")
        assert status in {200, 201}, answer

    @cached_property
    def _authorization(self) -> dict[str, str]:
        found = self._settings.auth_settings().values()
        return {one["key"]: one["value"] for one in found if one.get("in") == "header" and one.get("value")}


@contextmanager
def given_cluster() -> Iterator[RealCluster]:
    """One of the tests' own, made of what KUBEBUILDER_ASSETS holds; else the cluster that KUBECONFIG names."""
    if not ASSETS:
        cluster = RealCluster(Path(KUBECONFIG))
        cluster.define_training_jobs()
        yield cluster
        return
    assets = Path(ASSETS)
    assert not missing(assets), missing(assets)
    with control_plane(assets) as plane:
        cluster = RealCluster(plane.kubeconfig, has_controllers=plane.has_controllers)
        cluster.define_training_jobs()
        yield cluster
