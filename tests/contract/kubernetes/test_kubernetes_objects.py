"""What the launcher makes, taken by an API server: the fake one always, and a real one where one is given.

On the real one they make a namespace of their own, and delete it. No pod need be able to run there: what is looked at
are the objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import yaml

pytest.importorskip("kubernetes", reason="needs the extra `kubernetes`")

from orchestrator_svc.launchers.base import WorkerSpec
from orchestrator_svc.launchers.kubernetes.answers import ConflictError
from orchestrator_svc.launchers.kubernetes.api import CONFIG_MAP, EVENT, JOB, SERVICE, Api
from orchestrator_svc.launchers.kubernetes.launcher import KubernetesLauncher
from orchestrator_svc.settings import OrchestratorSettings
from orchestrator_svc.trainingjobs.crd import TRAINING_JOB
from orchestrator_svc.trainingjobs.status import event_of
from surogate.config.job import resolve_job
from surogate.errors import AlreadyExistsError, InvalidInputError, NotFoundError
from tests.helpers.cluster.kube import write_kubeconfig
from tests.helpers.cluster.kube_cluster import GIVEN, NOT_GIVEN, OLDEST, STRICT, RealCluster
from tests.helpers.cluster.kube_server import ApiServer
from tests.helpers.orchestrator import sft_config
from tests.helpers.waiting import PATIENCE

TEMPLATES = Path(__file__).parents[3] / "k8s" / "base" / "pod-templates"


@dataclass
class Server:
    """An API server, and the settings of an orchestrator that uses it."""

    settings: OrchestratorSettings
    api: Api


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.skipif(not GIVEN, reason=NOT_GIVEN))])
def real(request: pytest.FixtureRequest) -> RealCluster | None:
    """The cluster to run on; None is the fake one."""
    return None if request.param == "fake" else request.getfixturevalue("real_cluster")


@pytest_asyncio.fixture
async def server(real: RealCluster | None, tmp_path: Path) -> AsyncIterator[Server]:
    async with contextlib.AsyncExitStack() as stack:
        if real is None:
            fake = await stack.enter_async_context(ApiServer().serving())
            kubeconfig, namespace = write_kubeconfig(tmp_path / "kubeconfig", fake.url), "surogate"
        else:
            kubeconfig, namespace = real.kubeconfig, f"surogate-test-{secrets.token_hex(3)}"
            real.make_namespace(namespace, {})
            stack.callback(real.delete_namespace, namespace)
        settings = OrchestratorSettings(
            launcher="kubernetes",
            namespace=namespace,
            kubeconfig=kubeconfig,
            pod_templates=TEMPLATES,
            api_patience=60.0,
        )
        api = Api(namespace, kubeconfig=kubeconfig, patience=60.0)
        await api.open()
        stack.push_async_callback(api.close)
        yield Server(settings, api)


class Job(SimpleNamespace):
    """As much of a job as launchers need."""

    async def notice(self, text: str, *, component: str = "") -> None:
        self.told.append(text)


def job_of(tmp_path: Path, uid: str = "first", **cluster: Any) -> Any:
    config = resolve_job({**sft_config(), "cluster": cluster})
    return Job(job_id="objects", uid=uid, labels={}, config=config, output_dir=tmp_path, told=[])


async def kept(server: Server) -> dict[str, str]:
    """Names and uids of what the launcher has made."""
    found = {}
    for kind in (JOB, SERVICE, CONFIG_MAP):
        items, _ = await server.api.list(kind, labels="surogate.dev/job=objects")
        found |= {f"{kind.plural}/{item['metadata']['name']}": item["metadata"]["uid"] for item in items}
    return found


SPECS = [WorkerSpec("trainer"), WorkerSpec("inference", 0, config={"model": "m"}), WorkerSpec("reward")]


async def test_what_is_made_is_taken_adopted_and_deleted(
    server: Server, real: RealCluster | None, tmp_path: Path
) -> None:
    """Shipped templates, several nodes, a queue: strict validation takes them; the next orchestrator finds them."""
    if real is not None and real.minor < OLDEST:
        pytest.skip(f"Kubernetes 1.{real.minor} knows neither all probes nor suspended Jobs: 1.{OLDEST} is the oldest")
    cluster: Any = {"queue": "research", "max_runtime": 600, "trainer": {"nodes": 2, "gpus": 1}}
    cluster["tolerations"] = [{"key": "nvidia.com/gpu"}]
    async with contextlib.AsyncExitStack() as stack:
        first = KubernetesLauncher(server.settings)
        stack.push_async_callback(first.close)
        pool = await first.open(job_of(tmp_path, **cluster))
        for spec in SPECS:
            await pool.start(spec)
        made: dict[str, str] = {}
        async with asyncio.timeout(PATIENCE):
            while len(made) < 8:
                await asyncio.sleep(0.1)
                made = await kept(server)
        await pool.release()
        assert await kept(server) == made
        second = KubernetesLauncher(server.settings)
        stack.push_async_callback(second.close)
        pool = await second.open(job_of(tmp_path, **cluster))
        workers = [await pool.start(spec) for spec in SPECS]
        queued = "waits for quota in the queue research"
        async with asyncio.timeout(PATIENCE):
            while any(worker.status_message != queued for worker in workers):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.1)
        assert await kept(server) == made
        await pool.stop()
        async with asyncio.timeout(PATIENCE):
            while await kept(server):  # noqa: ASYNC110 - finalizers take what they take
                await asyncio.sleep(0.2)


async def test_refusals_are_told_apart(server: Server, real: RealCluster | None) -> None:
    body = {"metadata": {"name": "a"}, "data": {"x": "1"}}
    made = await server.api.create(CONFIG_MAP, body)
    with pytest.raises(AlreadyExistsError):
        await server.api.create(CONFIG_MAP, body)
    if real is None or real.minor >= STRICT:
        with pytest.raises(InvalidInputError, match=r'unknown field "spec\.nope"'):
            await server.api.create(JOB, {"apiVersion": "batch/v1", "kind": "Job", **yaml.safe_load(BROKEN)})
    with pytest.raises(NotFoundError):
        await server.api.get(CONFIG_MAP, "b")
    with pytest.raises(ConflictError):
        await server.api.patch(CONFIG_MAP, "a", {"metadata": {"resourceVersion": "1"}, "data": {"x": "2"}})
    await server.api.delete(CONFIG_MAP, "a", "00000000-0000-0000-0000-000000000000")
    assert (await server.api.get(CONFIG_MAP, "a"))["metadata"]["uid"] == made["metadata"]["uid"]
    await server.api.delete(CONFIG_MAP, "a", made["metadata"]["uid"])
    assert await server.api.find(CONFIG_MAP, "a") is None


BROKEN = """
metadata: {name: broken}
spec:
  nope: 1
  template:
    spec:
      restartPolicy: Never
      containers: [{name: x, image: x}]
"""


async def test_a_training_job_is_taken_told_of_and_deleted(server: Server) -> None:
    spec = {**sft_config(), "cluster": {"trainer": {"gpus": 1}}}
    body = {"apiVersion": TRAINING_JOB.version, "kind": "TrainingJob", "metadata": {"name": "one"}, "spec": spec}
    made = await server.api.create(TRAINING_JOB, body)
    change = {"metadata": {"finalizers": ["surogate.dev/job"], "resourceVersion": made["metadata"]["resourceVersion"]}}
    await server.api.patch(TRAINING_JOB, "one", change)
    await server.api.create(EVENT, event_of(made, "1", "Queued", "waiting", warning=False))
    told = await server.api.patch(TRAINING_JOB, "one", {"status": {"state": "Running", "step": 3}}, part="status")
    assert told["status"]["step"] == 3 and told["spec"]["train"]["model"] == "model"
    await server.api.delete(TRAINING_JOB, "one", made["metadata"]["uid"])
    held = await server.api.get(TRAINING_JOB, "one")
    assert held["metadata"]["deletionTimestamp"]
    await server.api.patch(TRAINING_JOB, "one", {"metadata": {"finalizers": []}})
    assert await server.api.find(TRAINING_JOB, "one") is None
