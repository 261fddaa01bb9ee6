"""The Kubernetes launcher on a fake cluster: what it makes, what it leaves, and what does it no harm."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="needs the extra `kubernetes`")

from surogate.v1 import job_pb2
from tests.helpers.cluster.kube import TEMPLATE, Cluster
from tests.helpers.cluster.kube_jobs import TrainerPods, training_on
from tests.helpers.orchestrator import Orchestrator, orchestrating, sft_config
from tests.helpers.waiting import PATIENCE

pytestmark = pytest.mark.usefixtures("api_server")
State = job_pb2.Job
LEFT = ("jobs", "pods", "services", "configmaps")


async def nothing_left(cluster: Cluster) -> None:
    await cluster.until(lambda: not any(cluster.api.objects[plural] for plural in LEFT))


async def started(orchestrator: Orchestrator, **fields: Any) -> str:
    """A job that has done a step."""
    job = await orchestrator.create(sft_config(max_steps=40), job_id="one", **fields)
    await orchestrator.until_step(job.name, 1)
    return job.name


def notices(events: list[job_pb2.JobEvent]) -> str:
    return "\n".join(event.notice.text for event in events if event.HasField("notice"))


async def test_a_job_runs_in_a_pod_and_leaves_nothing(tmp_path: Path) -> None:
    async with training_on(tmp_path) as (orchestrator, cluster):
        job = await orchestrator.create(sft_config(), job_id="one")
        ended = await orchestrator.ended(job.name)
        assert (ended.state, ended.step) == (State.STATE_SUCCEEDED, 5), ended.status_message
        await nothing_left(cluster)


async def test_everything_is_owned_and_labelled(tmp_path: Path) -> None:
    async with training_on(tmp_path, TrainerPods(0.05)) as (orchestrator, cluster):
        await started(orchestrator)
        [anchor] = cluster.api.objects["configmaps"].values()
        labels = {
            "app.kubernetes.io/name": "surogate",
            "app.kubernetes.io/managed-by": "surogate-orchestrator",
            "surogate.dev/job": "one",
        }
        [job] = cluster.api.objects["jobs"].values()
        [service] = cluster.api.objects["services"].values()
        [pod] = cluster.pods
        for item in (anchor, job, service, pod):
            assert labels.items() <= item["metadata"]["labels"].items()
        for item in (job, service):
            [owner] = item["metadata"]["ownerReferences"]
            assert owner["uid"] == anchor["metadata"]["uid"]
        assert service["spec"]["clusterIP"] == "None"
        assert pod["spec"]["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


async def test_each_deletion_says_what_becomes_of_the_pods(tmp_path: Path) -> None:
    """Both traps: no policy orphans a Job's pods, and a body without one wins over the query."""
    async with training_on(tmp_path) as (orchestrator, cluster):
        await orchestrator.ended((await orchestrator.create(sft_config(), job_id="one")).name)
        deletions = [request for request in cluster.api.requests if request.method == "DELETE"]
        assert {request.plural for request in deletions} == {"jobs", "services", "configmaps"}
        for request in deletions:
            assert request.query["propagationPolicy"] == "Background"
            assert request.body["propagationPolicy"] == "Background"
            assert request.body["preconditions"]["uid"]


async def test_a_cancelled_job_leaves_nothing(tmp_path: Path) -> None:
    async with training_on(tmp_path, TrainerPods(0.05)) as (orchestrator, cluster):
        name = await started(orchestrator)
        await orchestrator.cancel(name)
        assert (await orchestrator.ended(name)).state == State.STATE_CANCELLED
        await nothing_left(cluster)


async def test_a_dead_trainer_pod_is_replaced_and_training_goes_on(tmp_path: Path) -> None:
    async with training_on(tmp_path, TrainerPods(0.05)) as (orchestrator, cluster):
        job = await orchestrator.create(sft_config(max_steps=12), job_id="one")
        await orchestrator.until_step(job.name, 3)
        cluster.said[cluster.pod("trainer")["metadata"]["name"]] = ["loading", "CUDA error: out of memory"]
        await cluster.fail(cluster.pod("trainer"), 1)
        events = await orchestrator.history(job.name)
        ended = await orchestrator.get(job.name)
        assert (ended.state, ended.step) == (State.STATE_SUCCEEDED, 12), ended.status_message
        assert "trainer-0 ended with exit code 1; starting it again (restart 1)" in notices(events)
        assert "CUDA error: out of memory" in notices(events)
        assert "CUDA error" in (tmp_path / "out" / "logs" / "trainer-0.log").read_text()
        await nothing_left(cluster)


@pytest.mark.parametrize("code", [0, 143])
async def test_a_drained_node_costs_no_restart_of_the_budget(tmp_path: Path, code: int) -> None:
    """A service that ends in good order exits with 0: its Job is then complete, and the worker is not."""
    async with training_on(tmp_path, TrainerPods(0.05), max_worker_restarts=0) as (orchestrator, cluster):
        job = await orchestrator.create(sft_config(max_steps=12), job_id="one")
        await orchestrator.until_step(job.name, 3)
        await cluster.evict(cluster.pod("trainer"), code)
        ended = await orchestrator.ended(job.name)
        assert (ended.state, ended.step) == (State.STATE_SUCCEEDED, 12), ended.status_message


async def test_a_crash_loop_ends_with_the_last_lines_of_the_log(tmp_path: Path) -> None:
    async with training_on(tmp_path, max_worker_restarts=1) as (orchestrator, cluster):
        cluster.holds = True
        job = await orchestrator.create(sft_config(), job_id="one")
        for _ in range(2):
            pod = await cluster.until(lambda: next((one for one in cluster.pods if not _ended(one)), None))
            cluster.said[pod["metadata"]["name"]] = ["ModuleNotFoundError: No module named 'torch'"]
            await cluster.fail(pod, 1)
        ended = await orchestrator.ended(job.name)
        assert ended.state == State.STATE_FAILED
        assert "trainer-0 ended with exit code 1 after 1 restarts" in ended.status_message
        assert "No module named 'torch'" in ended.status_message
        await nothing_left(cluster)


def _ended(pod: Any) -> bool:
    return pod["status"]["phase"] in {"Failed", "Succeeded"}


async def test_a_restarted_orchestrator_adopts_its_pods(tmp_path: Path) -> None:
    pods = TrainerPods(0.05)
    async with training_on(tmp_path, pods) as (orchestrator, cluster):
        name = await started(orchestrator)
        [before] = [pod["metadata"]["uid"] for pod in cluster.pods]
        assert orchestrator.runner is not None
        await orchestrator.runner.stop()
        assert [pod["metadata"]["uid"] for pod in cluster.pods] == [before]
        orchestrator.runner.start()
        ended = await orchestrator.ended(name)
        assert (ended.state, ended.step) == (State.STATE_SUCCEEDED, 40), ended.status_message
        assert len(pods.trainers) == 1
        created = [request for request in cluster.api.requests if (request.method, request.plural) == ("POST", "jobs")]
        assert len(created) == 1
        await nothing_left(cluster)


async def test_an_answer_that_was_lost_makes_no_second_pod(tmp_path: Path) -> None:
    pods = TrainerPods()
    async with training_on(tmp_path, pods) as (orchestrator, cluster):
        cluster.api.lost_answers = 3
        ended = await orchestrator.ended((await orchestrator.create(sft_config(), job_id="one")).name)
        assert ended.state == State.STATE_SUCCEEDED, ended.status_message
        assert len(pods.trainers) == 1
        await nothing_left(cluster)


async def test_a_lost_watch_throttling_and_an_absent_api_server_do_no_harm(tmp_path: Path) -> None:
    pods = TrainerPods(0.05)
    async with training_on(tmp_path, pods) as (orchestrator, cluster):
        name = await started(orchestrator)
        cluster.api.expire()
        cluster.api.throttled, cluster.api.retry_after = 3, 0.1
        await asyncio.sleep(0.2)
        cluster.api.down = True
        cluster.api.cut()
        await asyncio.sleep(1.0)
        cluster.api.down = False
        ended = await orchestrator.ended(name)
        assert (ended.state, ended.step) == (State.STATE_SUCCEEDED, 40), ended.status_message
        assert len(pods.trainers) == 1
        await nothing_left(cluster)


async def test_what_was_left_while_the_api_server_was_away_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator_svc.jobs.runner.SWEEP_SECONDS", 0.2)
    async with training_on(tmp_path, TrainerPods(0.05), api_patience=0.2) as (orchestrator, cluster):
        name = await started(orchestrator)
        cluster.api.down = True
        cluster.api.cut()
        await orchestrator.cancel(name)
        assert (await orchestrator.ended(name)).state == State.STATE_CANCELLED
        assert cluster.pods
        cluster.api.down = False
        await nothing_left(cluster)


async def test_what_the_job_does_not_own_stays(tmp_path: Path) -> None:
    """A Job of the same name that somebody else made: the job fails and says so, and the Job is untouched."""
    async with training_on(tmp_path) as (orchestrator, cluster):
        pod = {**TEMPLATE["spec"], "restartPolicy": "Never"}
        spec = {"completions": 1, "suspend": True, "template": {"metadata": {"labels": {}}, "spec": pod}}
        other = cluster.api.add("jobs", {"metadata": {"name": "sg-one-trainer-0-1"}, "spec": spec})
        ended = await orchestrator.ended((await orchestrator.create(sft_config(), job_id="one")).name)
        assert ended.state == State.STATE_FAILED
        assert "a Job sg-one-trainer-0-1 that is not of this job" in ended.status_message
        await cluster.until(lambda: not cluster.api.objects["configmaps"])
        [job] = cluster.api.objects["jobs"].values()
        assert job["metadata"]["uid"] == other["metadata"]["uid"] and not job["metadata"].get("deletionTimestamp")


def anchor_of(job_id: str, run: str) -> dict[str, Any]:
    """The anchor of a job that another store, or another time, has made."""
    labels = {"app.kubernetes.io/name": "surogate", "app.kubernetes.io/instance": "surogate"}
    labels |= {"app.kubernetes.io/managed-by": "surogate-orchestrator", "surogate.dev/job": job_id}
    return {"metadata": {"name": f"sg-{job_id}", "labels": labels, "annotations": {"surogate.dev/run": run}}}


async def test_an_id_that_is_used_again_does_not_meet_its_predecessor(tmp_path: Path) -> None:
    """The first job's objects were left while the API server was away, and the job was forgotten."""
    async with training_on(tmp_path, TrainerPods(0.05), api_patience=0.2) as (orchestrator, cluster):
        name = await started(orchestrator)
        old = cluster.api.objects["configmaps"]["sg-one"]
        cluster.api.down = True
        cluster.api.cut()
        await orchestrator.cancel(name)
        await orchestrator.ended(name)
        await orchestrator.stub.DeleteJob(job_pb2.DeleteJobRequest(name=name))
        cluster.api.down = False
        await started(orchestrator)
        assert cluster.api.objects["configmaps"]["sg-one"]["metadata"]["uid"] != old["metadata"]["uid"]
        assert len(cluster.pods) == 1


async def test_a_job_of_the_same_id_that_the_store_does_not_know_is_left_alone(tmp_path: Path) -> None:
    async with training_on(tmp_path, TrainerPods(0.05)) as (orchestrator, cluster):
        old = cluster.api.add("configmaps", anchor_of("one", "of another store"))
        ended = await orchestrator.ended((await orchestrator.create(sft_config(), job_id="one")).name)
        assert ended.state == State.STATE_FAILED
        assert "a job of the id one that the job store does not know" in ended.status_message
        assert "delete the ConfigMap sg-one" in ended.status_message
        [anchor] = cluster.api.objects["configmaps"].values()
        assert anchor["metadata"]["uid"] == old["metadata"]["uid"]


async def test_an_emptied_store_costs_running_jobs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator_svc.jobs.runner.SWEEP_SECONDS", 0.05)
    async with training_on(tmp_path, TrainerPods(0.2)) as (orchestrator, cluster):
        await started(orchestrator)
        before = {plural: set(cluster.api.objects[plural]) for plural in LEFT}
        assert orchestrator.runner is not None
        await orchestrator.runner.stop()
        kept = ("namespace", "kubeconfig", "pod_templates", "api_patience")
        values = {key: getattr(orchestrator.settings, key) for key in kept}
        (tmp_path / "new").mkdir()
        async with orchestrating(tmp_path / "new", launcher_name="kubernetes", **values) as other:
            looked = len(cluster.api.requests)
            lists = {"method": "GET", "plural": "configmaps"}
            await cluster.until(lambda: len(asked(cluster, looked, **lists)) >= 3)
            assert not asked(cluster, looked, method="DELETE")
            ended = await other.ended((await other.create(sft_config(), job_id="one")).name)
            assert ended.state == State.STATE_FAILED
        assert {plural: set(cluster.api.objects[plural]) for plural in LEFT} == before
        orchestrator.runner.start()
        await orchestrator.cancel("jobs/one")
        await orchestrator.ended("jobs/one")
        await nothing_left(cluster)


def asked(cluster: Cluster, since: int, **like: str) -> list[Any]:
    """Requests to the API server, from a count on, that are like that."""
    found = cluster.api.requests[since:]
    return [one for one in found if all(getattr(one, key) == value for key, value in like.items())]


async def test_restarts_are_counted_over_restarts_of_the_orchestrator(tmp_path: Path) -> None:
    async with training_on(tmp_path, TrainerPods(0.05), max_worker_restarts=2) as (orchestrator, cluster):
        name = await started(orchestrator)
        assert orchestrator.runner is not None
        for restart in (1, 2):
            await cluster.fail(cluster.pod("trainer"), 1)
            again = f"sg-one-trainer-0-{restart + 1}"
            await cluster.until(lambda again=again: again in cluster.api.objects["jobs"])
            await cluster.until(lambda: cluster.pod("trainer")["status"].get("phase") == "Running")
            await orchestrator.runner.stop()
            orchestrator.runner.start()
        await cluster.fail(cluster.pod("trainer"), 1)
        ended = await orchestrator.ended(name)
        assert ended.state == State.STATE_FAILED
        assert "trainer-0 ended with exit code 1 after 2 restarts" in ended.status_message


async def test_a_mistake_in_a_template_is_told_by_its_field(tmp_path: Path) -> None:
    async with training_on(tmp_path) as (orchestrator, cluster):
        if cluster.api.is_dated:
            pytest.skip("this API server is too old for strict validation")
        file = tmp_path / "templates" / "trainer.yaml"
        file.write_text(file.read_text().replace("containers:", "nodeSelektor: {a: b}\n  containers:"))
        ended = await orchestrator.ended((await orchestrator.create(sft_config(), job_id="one")).name)
        assert ended.state == State.STATE_FAILED
        assert 'unknown field "spec.template.spec.nodeSelektor"' in ended.status_message
        await nothing_left(cluster)


async def test_a_job_whose_anchor_somebody_deletes_fails_and_says_so(tmp_path: Path) -> None:
    """The cluster would collect whatever is made for it anew."""
    async with training_on(tmp_path, TrainerPods(0.05)) as (orchestrator, cluster):
        name = await started(orchestrator)
        cluster.api.remove("configmaps", "sg-one")
        ended = await orchestrator.ended(name)
        assert ended.state == State.STATE_FAILED
        assert "was deleted with the ConfigMap sg-one" in ended.status_message
        await nothing_left(cluster)


async def test_a_pod_that_somebody_deletes_comes_again(tmp_path: Path) -> None:
    async with training_on(tmp_path, TrainerPods(0.05)) as (orchestrator, cluster):
        job = await orchestrator.create(sft_config(max_steps=12), job_id="one")
        await orchestrator.until_step(job.name, 3)
        cluster.api.begin_deletion("pods", cluster.pod("trainer"))
        events = await orchestrator.history(job.name)
        assert (await orchestrator.get(job.name)).state == State.STATE_SUCCEEDED
        assert "trainer-0 lost its pod: somebody deleted it, or its node is gone" in notices(events)


async def test_missing_rights_are_told_in_the_api_servers_words(tmp_path: Path) -> None:
    async with training_on(tmp_path) as (orchestrator, cluster):
        message = 'jobs.batch is forbidden: User "system:serviceaccount:surogate:weak" cannot create resource "jobs"'
        cluster.api.forbidden["jobs"] = message
        ended = await orchestrator.ended((await orchestrator.create(sft_config(), job_id="one")).name)
        assert ended.state == State.STATE_FAILED and message in ended.status_message
        await nothing_left(cluster)


async def test_a_slow_api_server_holds_nobody_up(tmp_path: Path) -> None:
    """Calls wait in threads of their own: the orchestrator answers its clients meanwhile."""
    async with training_on(tmp_path) as (orchestrator, cluster):
        cluster.api.hangs = True
        job = await orchestrator.create(sft_config(), job_id="one")
        await orchestrator.until(job.name, State.STATE_STARTING)
        for _ in range(10):
            assert (await orchestrator.get(job.name)).state == State.STATE_STARTING
            await asyncio.sleep(0.02)
        cluster.api.hangs = False
        ended = await orchestrator.ended(job.name)
        assert ended.state == State.STATE_SUCCEEDED, ended.status_message
        await nothing_left(cluster)


def test_an_orchestrator_without_a_cluster_does_not_start(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "orchestrator_svc",
        "--launcher",
        "kubernetes",
        "--store-url",
        f"sqlite:///{tmp_path}/j.db",
    ]
    environment = {**os.environ, "HOME": str(tmp_path), "KUBECONFIG": str(tmp_path / "none")}
    environment.pop("KUBERNETES_SERVICE_HOST", None)
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert ran.returncode == 2
    assert "kubeconfig: there is no way to the cluster" in ran.stderr and "Traceback" not in ran.stderr
