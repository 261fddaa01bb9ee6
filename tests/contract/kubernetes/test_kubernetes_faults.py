"""What goes wrong between the launcher and a cluster: nothing hangs without a word."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="needs the extra `kubernetes`")

from orchestrator_svc.launchers import incarnations
from orchestrator_svc.launchers.kubernetes import api, troubles, words, worker
from orchestrator_svc.launchers.kubernetes.answers import ApiUnavailableError
from orchestrator_svc.launchers.kubernetes.api import CONFIG_MAP, Api
from orchestrator_svc.launchers.kubernetes.mirror import Mirror
from surogate.v1 import job_pb2
from tests.contract.kubernetes.test_kubernetes_grpo import grpo_config
from tests.contract.kubernetes.test_kubernetes_launcher import nothing_left, notices
from tests.helpers.cluster.kube import Cluster, write_kubeconfig
from tests.helpers.cluster.kube_jobs import GrpoPods, TrainerPods, reinforcing_on, training_on
from tests.helpers.cluster.kube_server import ApiServer, Object, Request, StatusError
from tests.helpers.orchestrator import Orchestrator, sft_config
from tests.helpers.waiting import PATIENCE, until

State = job_pb2.Job
SCHEDULED = {"type": "PodScheduled", "status": "True"}


@asynccontextmanager
async def talking(folder: Path, patience: float = 60.0) -> AsyncIterator[tuple[ApiServer, Api]]:
    """An API server, and a client of it."""
    async with ApiServer().serving() as server:
        client = Api(
            server.namespace, kubeconfig=write_kubeconfig(folder / "kubeconfig", server.url), patience=patience
        )
        await client.open()
        try:
            yield server, client
        finally:
            await client.close()


@asynccontextmanager
async def mirroring(client: Api) -> AsyncIterator[Mirror]:
    mirror = Mirror(client, "", kinds=(CONFIG_MAP,))
    mirror.start()
    try:
        yield mirror
    finally:
        await mirror.close()


async def told(orchestrator: Orchestrator, job: str, text: str) -> str:
    """The first notice that says so."""
    async with asyncio.timeout(PATIENCE):
        async for event in orchestrator.watch(job):
            if text in event.notice.text:
                return event.notice.text
    raise AssertionError(f"{job} ended, and never said: {text}")


def names_of(mirror: Mirror) -> list[str]:
    return sorted(item["metadata"]["name"] for item in mirror.items(CONFIG_MAP))


# The API server.


async def test_a_list_that_is_forgotten_between_its_pages_is_read_anew(tmp_path: Path) -> None:
    async with talking(tmp_path) as (server, client):
        server.page = 2
        for i in range(5):
            server.add("configmaps", {"metadata": {"name": f"c{i}"}})
        found, _ = await client.list(CONFIG_MAP)
        assert len(found) == 5
        expired = StatusError(410, "Expired", "The provided continue parameter is too old")
        server.refuses = lambda request: expired if "continue" in request.query else None
        found, version = await client.list(CONFIG_MAP)
        assert len(found) == 5 and version


@pytest.mark.parametrize("retry_after", ["1", "Wed, 21 Oct 2026 07:28:00 GMT", None])
async def test_throttling_and_faults_of_the_server_are_waited_out(tmp_path: Path, retry_after: str | None) -> None:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    answers = [
        StatusError(429, "TooManyRequests", "slow down", headers),
        StatusError(500, "InternalError", "etcdserver: leader changed"),
        StatusError(503, "ServiceUnavailable", "apiserver not ready"),
        StatusError(504, "Timeout", "Too large resource version"),
    ]
    async with talking(tmp_path, patience=60.0) as (server, client):
        server.refuses = lambda request: answers.pop(0) if answers else None
        assert await client.create(CONFIG_MAP, {"metadata": {"name": "a"}})
        assert not answers


@pytest.mark.parametrize("said", [b"<html>Bad gateway</html>", b'{"kind": "ConfigMap", "meta', b"[]", b""])
async def test_what_is_no_answer_of_an_api_server_counts_as_none(tmp_path: Path, said: bytes) -> None:
    async with talking(tmp_path) as (server, client):
        server.add("configmaps", {"metadata": {"name": "a"}})
        broken = [said]
        server.refuses = lambda request: broken.pop() if broken else None
        assert (await client.get(CONFIG_MAP, "a"))["metadata"]["name"] == "a"


async def test_an_answer_that_trickles_in_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "CALL_SECONDS", 3.0)
    async with talking(tmp_path, patience=0.1) as (server, client):
        server.add("configmaps", {"metadata": {"name": "a"}})
        server.trickles = 0.05
        with pytest.raises(ApiUnavailableError, match=r"not all there within 3 s"):
            await client.get(CONFIG_MAP, "a")


async def test_a_server_that_was_restored_from_a_backup_is_listed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a watch from a version that it has not reached, and says nothing."""
    monkeypatch.setattr(api, "WATCH_SECONDS", 1)
    async with talking(tmp_path) as (server, client), mirroring(client) as mirror:
        server.add("configmaps", {"metadata": {"name": "old"}})
        backup, version = copy.deepcopy(server.objects), server.version
        for i in range(20):
            server.add("configmaps", {"metadata": {"name": f"new{i}"}})
        await until(lambda: len(names_of(mirror)) == 21)
        server.restore(backup, version)
        server.add("configmaps", {"metadata": {"name": "after"}})
        assert names_of(mirror) != ["after", "old"], "nobody has told yet"
        await until(lambda: names_of(mirror) == ["after", "old"])


async def test_versions_that_go_back_are_listed_anew_at_once(tmp_path: Path) -> None:
    async with talking(tmp_path) as (server, client), mirroring(client) as mirror:
        server.add("configmaps", {"metadata": {"name": "kept"}})
        server.add("configmaps", {"metadata": {"name": "lost"}})
        await until(lambda: len(names_of(mirror)) == 2)
        await until(lambda: server._streams)
        backup = {plural: {} if plural == "configmaps" else items for plural, items in server.objects.items()}
        backup["configmaps"] = {"kept": server.objects["configmaps"]["kept"]}
        server.restore(backup, server.version)
        [stream] = server._streams
        bookmark = {"type": "BOOKMARK", "object": {"kind": "ConfigMap", "metadata": {"resourceVersion": "5"}}}
        await stream.write(json.dumps(bookmark).encode() + b"\n")
        await until(lambda: names_of(mirror) == ["kept"])


@pytest.mark.parametrize(
    "said", [b'{"type": "ADDED", "obj', b"[1]", b'{"type": "ADDED"}', b'{"type":"ADDED","object":{}}']
)
async def test_a_watch_that_says_nonsense_is_begun_anew(tmp_path: Path, said: bytes) -> None:
    async with talking(tmp_path) as (server, client), mirroring(client) as mirror:
        server.add("configmaps", {"metadata": {"name": "a"}})
        await until(lambda: names_of(mirror) == ["a"] and server._streams)
        [stream] = server._streams
        await stream.write(said + b"\n")
        await until(lambda: mirror.trouble)
        server.add("configmaps", {"metadata": {"name": "b"}})
        await until(lambda: names_of(mirror) == ["a", "b"] and not mirror.trouble)


async def test_a_watch_that_is_half_closed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is gone without a word: silence for longer than the server was asked to keep the watch."""
    monkeypatch.setattr(api, "_WATCH_SILENCE", 0.5)
    async with talking(tmp_path) as (server, client), mirroring(client) as mirror:
        await until(lambda: server._streams)
        for stream in list(server._streams):
            stream.write = _swallow  # type: ignore[method-assign]
        server.add("configmaps", {"metadata": {"name": "a"}})
        await until(lambda: names_of(mirror) == ["a"])


async def _swallow(data: Any) -> None:
    """Bytes that never arrive."""


# What WatchJob says of it.


def refusing(plural: str, answer: StatusError, times: int = 1_000_000) -> Callable[[Request], StatusError | None]:
    left = [times]

    def refuses(request: Request) -> StatusError | None:
        if (request.method, request.plural) != ("POST", plural) or not left[0]:
            return None
        left[0] -= 1
        return answer

    return refuses


TERMINATING = (
    'configmaps "sg-one" is forbidden: unable to create new content in namespace surogate '
    "because it is being terminated"
)
DENIED = 'admission webhook "policy.example.org" denied the request: images must be signed'
MISBEHAVES = 'Internal error occurred: failed calling webhook "policy.example.org": connect: connection refused'


@pytest.mark.parametrize(
    ("plural", "answer", "text"),
    [
        ("configmaps", StatusError(403, "Forbidden", TERMINATING), "because it is being terminated"),
        ("configmaps", StatusError(404, "NotFound", 'namespaces "surogate" not found'), 'namespaces "surogate"'),
        ("jobs", StatusError(403, "Forbidden", DENIED), DENIED),
        ("services", StatusError(400, "BadRequest", DENIED), DENIED),
        ("jobs", StatusError(422, "Invalid", 'Job "x" is invalid: spec.template: nope'), "spec.template: nope"),
    ],
)
async def test_what_is_refused_for_good_fails_the_job_in_the_servers_words(
    tmp_path: Path, plural: str, answer: StatusError, text: str
) -> None:
    async with training_on(tmp_path) as (orchestrator, cluster):
        cluster.api.refuses = refusing(plural, answer)
        ended = await orchestrator.ended((await orchestrator.create(sft_config(), job_id="one")).name)
        assert ended.state == State.STATE_FAILED and text in ended.status_message
        await nothing_left(cluster)


@pytest.mark.parametrize("plural", ["configmaps", "services", "jobs"])
async def test_why_a_call_has_to_wait_is_told(tmp_path: Path, plural: str) -> None:
    async with training_on(tmp_path) as (orchestrator, cluster):
        cluster.api.refuses = refusing(plural, StatusError(500, "InternalError", MISBEHAVES), times=4)
        job = await orchestrator.create(sft_config(), job_id="one")
        assert MISBEHAVES in await told(orchestrator, job.name, "waits for the API server")
        ended = await orchestrator.ended(job.name)
        assert ended.state == State.STATE_SUCCEEDED, ended.status_message


async def test_a_quota_of_jobs_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        'jobs.batch "sg-one-trainer-0-1" is forbidden: exceeded quota: few, requested: count/jobs.batch=1, used: 2'
    )
    monkeypatch.setattr(worker, "_LOOK_SECONDS", 0.5)
    async with training_on(tmp_path) as (orchestrator, cluster):
        cluster.api.refuses = refusing("jobs", StatusError(403, "Forbidden", message), times=1)
        job = await orchestrator.create(sft_config(), job_id="one")
        assert "over the quota few, requested: count/jobs.batch=1" in await told(orchestrator, job.name, "quota")
        ended = await orchestrator.ended(job.name)
        assert ended.state == State.STATE_SUCCEEDED, ended.status_message


async def test_a_cluster_that_cannot_be_watched_is_told_of(tmp_path: Path) -> None:
    async with training_on(tmp_path) as (orchestrator, cluster):
        forbidden = StatusError(403, "Forbidden", 'pods is forbidden: User "weak" cannot watch resource "pods"')
        cluster.api.refuses = lambda request: forbidden if request.plural == "pods" else None
        cluster.api.cut()
        job = await orchestrator.create(sft_config(), job_id="one")
        assert 'User "weak" cannot watch' in await told(orchestrator, job.name, "cannot be watched")
        cluster.api.refuses = lambda request: None
        ended = await orchestrator.ended(job.name)
        assert ended.state == State.STATE_SUCCEEDED, ended.status_message


# What WatchJob says of pods.


async def held(orchestrator: Orchestrator, cluster: Cluster) -> tuple[str, Object]:
    """A job, and its pod, to which nothing happens but what the test says."""
    cluster.holds = True
    job = await orchestrator.create(sft_config(), job_id="one")
    return job.name, await cluster.until(lambda: next(iter(cluster.pods), None))


def event_about(cluster: Cluster, pod: Object, reason: str, message: str) -> None:
    about = {"kind": "Pod", "namespace": cluster.api.namespace, "uid": pod["metadata"]["uid"]}
    body = {"metadata": {"name": reason.lower()}, "type": "Warning", "reason": reason, "message": message}
    cluster.api.add("events", {**body, "involvedObject": about})


async def test_a_volume_that_cannot_be_mounted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod's own status says ContainerCreating, for ever."""
    monkeypatch.setattr(troubles, "SET_UP_SECONDS", 0.2)
    monkeypatch.setattr(worker, "_LOOK_SECONDS", 0.5)
    async with training_on(tmp_path) as (orchestrator, cluster):
        name, pod = await held(orchestrator, cluster)
        creating = {"name": "worker", "image": "x", "state": {"waiting": {"reason": "ContainerCreating"}}}
        event_about(cluster, pod, "FailedMount", 'MountVolume.SetUp failed for volume "tls": secret "tls" not found')
        cluster.set_status(pod, conditions=[SCHEDULED], containerStatuses=[creating])
        text = await told(orchestrator, name, "cannot be started on its node")
        assert 'secret "tls" not found' in text


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (
            {
                "containerStatuses": [
                    {"name": "worker", "image": "r/x:1", "state": {"waiting": {"reason": "ImagePullBackOff"}}}
                ]
            },
            "trainer-0 cannot pull the image r/x:1",
        ),
        (
            {
                "initContainerStatuses": [
                    {"name": "fetch", "image": "r/f:1", "state": {"waiting": {"reason": "ErrImagePull"}}}
                ]
            },
            "trainer-0 cannot pull the image r/f:1",
        ),
        (
            {
                "phase": "Failed",
                "initContainerStatuses": [
                    {"name": "fetch", "image": "x", "state": {"terminated": {"exitCode": 4, "reason": "Error"}}}
                ],
            },
            "trainer-0 failed: its container fetch ended with exit code 4; starting it again",
        ),
        (
            {
                "phase": "Failed",
                "containerStatuses": [
                    {"name": "worker", "image": "x", "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}},
                    {"name": "proxy", "image": "x", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}},
                ],
            },
            "trainer-0 failed: its container proxy was killed for using more memory than its limit: raise it",
        ),
        (
            {
                "phase": "Running",
                "containerStatuses": [
                    {"name": "worker", "image": "x", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}},
                    {"name": "proxy", "image": "x", "state": {"running": {}}},
                ],
            },
            "trainer-0 was killed for using more memory than its limit (1Gi): raise it",
        ),
        (
            {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: ephemeral-storage."},
            "trainer-0 was evicted from its node: The node was low on resource: ephemeral-storage.",
        ),
        ({"phase": "Failed", "reason": "NodeAffinity"}, "trainer-0 ended; starting it again"),
    ],
)
async def test_what_happens_to_a_pod_is_told(tmp_path: Path, status: dict[str, Any], text: str) -> None:
    async with training_on(tmp_path) as (orchestrator, cluster):
        name, pod = await held(orchestrator, cluster)
        cluster.set_status(pod, conditions=[SCHEDULED], **status)
        assert text in await told(orchestrator, name, text)


async def test_a_pods_end_is_told_though_its_jobs_is_heard_first(tmp_path: Path) -> None:
    """Jobs and pods come by two watches, each in its own time."""
    async with training_on(tmp_path) as (orchestrator, cluster):
        name, pod = await held(orchestrator, cluster)
        late = StatusError(500, "InternalError", "the watch cache is not ready")
        cluster.api.refuses = lambda request: late if "watch" in request.query and request.plural == "pods" else None
        cluster.api.cut()
        await until(lambda: any(one.plural == "pods" for one in cluster.api.requests[-3:]))
        await cluster.fail(pod, 137, reason="OOMKilled")
        text = await told(orchestrator, name, "starting it again")
        assert "was killed for using more memory than its limit (1Gi): raise it" in text


async def test_a_pod_that_is_preempted_says_so_before_there_is_another(tmp_path: Path) -> None:
    async with training_on(tmp_path, TrainerPods(0.05)) as (orchestrator, cluster):
        job = await orchestrator.create(sft_config(max_steps=20), job_id="one")
        await orchestrator.until_step(job.name, 2)
        pod, cluster.holds = cluster.pod("trainer"), True
        reason = {"reason": "PreemptionByScheduler", "message": "preempted by pod x"}
        pod["status"].setdefault("conditions", []).append({"type": "DisruptionTarget", "status": "True", **reason})
        cluster.api.begin_deletion("pods", pod)
        text = "trainer-0 made room for a pod of higher priority (preempted by pod x); another pod will take its place"
        assert await told(orchestrator, job.name, "made room") == text
        cluster.holds = False
        ended = await orchestrator.ended(job.name)
        assert ended.state == State.STATE_SUCCEEDED, ended.status_message


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "OVERDUE_SECONDS", 0.5)
    monkeypatch.setattr(worker, "_LOOK_SECONDS", 0.5)


def strand(cluster: Cluster, pod: Object) -> None:
    """The node of a pod is away: the cluster marks the pod, and nobody ends it."""
    pod["spec"]["nodeName"] = "node-7"
    reason = {"reason": "DeletionByTaintManager", "message": "Taint manager: deleting due to NoExecute taint"}
    pod["status"].setdefault("conditions", []).append({"type": "DisruptionTarget", "status": "True", **reason})
    cluster.strands.add(pod["metadata"]["uid"])
    cluster.api.begin_deletion("pods", pod)


async def test_a_trainer_on_a_node_that_is_away_says_what_to_do(tmp_path: Path, impatient: None) -> None:
    async with training_on(tmp_path, TrainerPods(0.05)) as (orchestrator, cluster):
        job = await orchestrator.create(sft_config(max_steps=20), job_id="one")
        await orchestrator.until_step(job.name, 2)
        pod = cluster.pod("trainer")
        strand(cluster, pod)
        assert "left a node that does not tolerate it any more" in await told(orchestrator, job.name, "left a node")
        text = await told(orchestrator, job.name, "cannot leave node-7, which does not answer")
        assert f"kubectl delete pod {pod['metadata']['name']} --force" in text
        cluster.strands.clear()
        ended = await orchestrator.ended(job.name)
        assert ended.state == State.STATE_SUCCEEDED, ended.status_message


async def test_a_replica_on_a_node_that_is_away_is_replaced(tmp_path: Path, impatient: None) -> None:
    pods = GrpoPods(seconds=0.02)
    async with reinforcing_on(tmp_path, pods) as (orchestrator, cluster, model):
        job = await orchestrator.create(grpo_config(model, replicas=2, max_steps=2000), job_id="rl")
        await orchestrator.until_step(job.name, 2)
        strand(cluster, cluster.pod("inference", 1))
        assert "inference-1 was lost with its node" in await told(orchestrator, job.name, "was lost with its node")
        new = await cluster.until(lambda: len(pods.replicas) == 3 and list(pods.replicas.values())[2])
        await cluster.until(lambda: new.served)
        cluster.strands.clear()
        await orchestrator.cancel(job.name)
        await orchestrator.ended(job.name)
        await nothing_left(cluster)


async def test_a_queue_takes_as_long_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time to be ready in begins when there is room to run in."""
    monkeypatch.setattr(incarnations.RestartedWorker.ready, "__defaults__", (5.0,))
    monkeypatch.setattr(worker, "_LOOK_SECONDS", 0.1)
    async with training_on(tmp_path) as (orchestrator, cluster):
        job = await orchestrator.create({**sft_config(), "cluster": {"queue": "research"}}, job_id="one")
        await told(orchestrator, job.name, "waits for quota in the queue research")
        await asyncio.sleep(6.0)
        assert (await orchestrator.get(job.name)).state == State.STATE_STARTING
        [made] = cluster.api.objects["jobs"].values()
        cluster.api.change_spec("jobs", made["metadata"]["name"], suspend=False)
        ended = await orchestrator.ended(job.name)
        assert ended.state == State.STATE_SUCCEEDED, ended.status_message


async def test_a_job_that_its_queue_preempts_says_so_and_goes_on(tmp_path: Path) -> None:
    """Kueue suspends the Job again; the Job controller deletes its pods, and says no more."""
    async with training_on(tmp_path, TrainerPods(0.05)) as (orchestrator, cluster):
        config = {**sft_config(max_steps=20), "cluster": {"queue": "research"}}
        job = await orchestrator.create(config, job_id="one")
        [made] = await cluster.until(lambda: list(cluster.api.objects["jobs"].values()))
        cluster.api.change_spec("jobs", made["metadata"]["name"], suspend=False)
        await orchestrator.until_step(job.name, 2)
        cluster.api.change_spec("jobs", made["metadata"]["name"], suspend=True)
        cluster.api.begin_deletion("pods", cluster.pod("trainer"))
        await cluster.until(lambda: not cluster.pods)

        async def waits() -> bool:
            worker = (await orchestrator.get(job.name)).workers[0]
            return worker.status_message == "waits for quota in the queue research"

        await until(waits)
        cluster.api.change_spec("jobs", made["metadata"]["name"], suspend=False)
        again = "trainer-0 had to give its place up, and waits for quota in the queue research; it runs again"
        assert again in notices(await orchestrator.history(job.name))
        assert (await orchestrator.get(job.name)).state == State.STATE_SUCCEEDED


async def test_an_image_that_cannot_be_pulled_is_named_when_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incarnations.RestartedWorker.ready, "__defaults__", (5.0,))
    async with training_on(tmp_path) as (orchestrator, cluster):
        name, pod = await held(orchestrator, cluster)
        waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "manifest unknown"}}
        cluster.set_status(
            pod, conditions=[SCHEDULED], containerStatuses=[{"name": "worker", "image": "r/x:1", "state": waiting}]
        )
        ended = await orchestrator.ended(name)
        assert ended.state == State.STATE_FAILED
        assert "not ready within 5 s: cannot pull the image r/x:1: manifest unknown" in ended.status_message
