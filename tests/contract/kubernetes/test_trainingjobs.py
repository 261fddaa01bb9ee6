"""TrainingJobs on the fake API server: kubectl's apply, get, describe, scale and delete, and JobService beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="needs the extra `kubernetes`")

from orchestrator_svc.jobstore import store
from orchestrator_svc.jobstore.database import Database
from orchestrator_svc.launchers.kubernetes.api import Api
from orchestrator_svc.trainingjobs.reconciler import Reconciler
from surogate.v1 import job_pb2
from tests.contract.kubernetes.test_kubernetes_launcher import nothing_left
from tests.helpers.cluster.kube import Cluster, write_kubeconfig
from tests.helpers.cluster.kube_jobs import GrpoPods, TrainerPods, reinforcing_on, training_on
from tests.helpers.cluster.kube_server import Object, StatusError
from tests.helpers.grpo.grpo_job import job_config
from tests.helpers.orchestrator import Orchestrator, sft_config
from tests.helpers.store_faults import Fault, StoreFaults

pytestmark = pytest.mark.usefixtures("api_server")
State = job_pb2.Job


@asynccontextmanager
async def reconciling(folder: Path, orchestrator: Orchestrator, cluster: Cluster) -> AsyncIterator[None]:
    """A reconciler beside an orchestrator."""
    if cluster.api.is_dated:
        pytest.skip("this API server is older than all that TrainingJobs are for")
    assert orchestrator.settings is not None and orchestrator.database is not None
    kubeconfig = write_kubeconfig(folder / "kubeconfig", cluster.api.url)
    api = Api(cluster.api.namespace, kubeconfig=kubeconfig, patience=60.0)
    reconciler = Reconciler(orchestrator.settings, api, orchestrator.database, orchestrator.servicer)
    await reconciler.start()
    try:
        yield
    finally:
        await reconciler.close()


def apply(cluster: Cluster, spec: Object, name: str = "mine") -> Object:
    """kubectl apply of a new resource."""
    return cluster.api.add("trainingjobs", {"metadata": {"name": name}, "spec": spec})


def change(cluster: Cluster, name: str = "mine", **spec: Any) -> None:
    """kubectl apply, or scale, of a changed one."""
    cluster.api.change_spec("trainingjobs", name, **spec)


def status(cluster: Cluster, name: str = "mine") -> Object:
    return cluster.api.objects["trainingjobs"].get(name, {}).get("status") or {}


def spec_of(cluster: Cluster, name: str = "mine") -> Object:
    return cluster.api.objects["trainingjobs"][name]["spec"]  # type: ignore[no-any-return]


def condition(cluster: Cluster, kind: str) -> Object:
    return next((one for one in status(cluster).get("conditions") or [] if one["type"] == kind), {})


async def test_a_resource_becomes_a_job_and_tells_how_it_is(tmp_path: Path) -> None:
    async with (
        training_on(tmp_path, TrainerPods(0.02), training_jobs=True) as (orchestrator, cluster),
        reconciling(tmp_path, orchestrator, cluster),
    ):
        resource = apply(cluster, sft_config())
        await cluster.until(lambda: condition(cluster, "Complete").get("status") == "True")
        told = status(cluster)
        assert (told["state"], told["step"], told["maxSteps"], told["job"]) == ("Succeeded", 5, 5, "jobs/mine")
        assert condition(cluster, "Accepted")["status"] == "True"
        assert condition(cluster, "Failed")["status"] == "False"
        assert told["endTime"].endswith("Z") and told["metrics"]["loss"] == 0.2
        job = await orchestrator.get("jobs/mine")
        assert job.labels["surogate.dev/training-job-uid"] == resource["metadata"]["uid"]
        await cluster.until(lambda: "Succeeded" in [one["reason"] for one in cluster.api.objects["events"].values()])
        events = list(cluster.api.objects["events"].values())
        reasons = [event["reason"] for event in events]
        assert reasons[0] == "Queued" and "Running" in reasons and "CheckpointSaved" in reasons
        assert {event["involvedObject"]["uid"] for event in events} == {resource["metadata"]["uid"]}
        await cluster.until(lambda: not cluster.pods)  # the job has ended, the resource stays


async def test_a_deleted_resource_cancels_its_job_and_leaves_nothing(tmp_path: Path) -> None:
    async with (
        training_on(tmp_path, TrainerPods(0.05), training_jobs=True) as (orchestrator, cluster),
        reconciling(tmp_path, orchestrator, cluster),
    ):
        resource = apply(cluster, sft_config(max_steps=400))
        await cluster.until(lambda: status(cluster).get("step"))
        [anchor] = cluster.api.objects["configmaps"].values()
        [owner] = anchor["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"]) == ("TrainingJob", resource["metadata"]["uid"])
        cluster.api.begin_deletion("trainingjobs", cluster.api.objects["trainingjobs"]["mine"])
        await cluster.until(lambda: not cluster.api.objects["trainingjobs"])
        await nothing_left(cluster)
        listed = await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest())
        assert not listed.jobs


async def test_what_is_wrong_is_told_with_its_key_until_it_is_mended(tmp_path: Path) -> None:
    async with (
        training_on(tmp_path, training_jobs=True) as (orchestrator, cluster),
        reconciling(tmp_path, orchestrator, cluster),
    ):
        apply(cluster, sft_config(lerning_rate=1e-4))
        await cluster.until(lambda: condition(cluster, "Accepted").get("status") == "False")
        refusal = condition(cluster, "Accepted")
        assert refusal["reason"] == "InvalidConfig"
        assert "train.lerning_rate: unknown key; did you mean `learning_rate`?" in refusal["message"]
        [event] = cluster.api.objects["events"].values()
        assert (event["type"], event["reason"]) == ("Warning", "Refused")
        change(cluster, **sft_config())
        await cluster.until(lambda: status(cluster).get("state") == "Succeeded")
        assert condition(cluster, "Accepted")["status"] == "True"


async def test_a_configuration_that_changes_is_refused_and_the_job_goes_on(tmp_path: Path) -> None:
    async with (
        training_on(tmp_path, TrainerPods(0.05), training_jobs=True) as (orchestrator, cluster),
        reconciling(tmp_path, orchestrator, cluster),
    ):
        apply(cluster, sft_config(max_steps=60))
        await cluster.until(lambda: status(cluster).get("step"))
        change(cluster, **sft_config(max_steps=9))
        await cluster.until(lambda: condition(cluster, "Accepted").get("reason") == "SpecChanged")
        await cluster.until(lambda: status(cluster).get("state") == "Succeeded")
        assert status(cluster)["step"] == 60
        assert condition(cluster, "Accepted")["reason"] == "SpecChanged"


async def test_the_scale_of_a_resource_is_that_of_its_job(tmp_path: Path) -> None:
    pods = GrpoPods(seconds=0.05)
    async with (
        reinforcing_on(tmp_path, pods, training_jobs=True) as (orchestrator, cluster, model),
        reconciling(tmp_path, orchestrator, cluster),
    ):
        apply(cluster, job_config(model, max_steps=500))
        await cluster.until(lambda: status(cluster).get("step"))
        # The API server answers for the scale of nothing that does not say how large it is.
        await cluster.until(lambda: spec_of(cluster).get("inferenceReplicas") == 1)
        change(cluster, inferenceReplicas=2)
        await cluster.until(lambda: status(cluster).get("inferenceReplicas") == 2)
        assert "component=inference" in status(cluster)["selector"]
        assert len(pods.replicas) == 2
        await orchestrator.stub.ScaleJob(job_pb2.ScaleJobRequest(name="jobs/mine", inference=3))
        await cluster.until(lambda: spec_of(cluster).get("inferenceReplicas") == 3)
        await cluster.until(lambda: status(cluster).get("inferenceReplicas") == 3)
        assert condition(cluster, "Accepted")["status"] == "True"
        cluster.api.begin_deletion("trainingjobs", cluster.api.objects["trainingjobs"]["mine"])
        await cluster.until(lambda: not cluster.api.objects["trainingjobs"])
        await nothing_left(cluster)


async def test_a_restart_and_a_lost_answer_make_no_second_job(tmp_path: Path) -> None:
    async with training_on(tmp_path, TrainerPods(0.02), training_jobs=True) as (orchestrator, cluster):
        async with reconciling(tmp_path, orchestrator, cluster):
            apply(cluster, sft_config(max_steps=30))
            cluster.api.lost_answers = 2
            await cluster.until(lambda: status(cluster).get("step"))
        async with reconciling(tmp_path, orchestrator, cluster):
            cluster.api.expire()
            await cluster.until(lambda: status(cluster).get("state") == "Succeeded")
        listed = await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest())
        assert [job.name for job in listed.jobs] == ["jobs/mine"]
        sequences = [name.rpartition("-")[2] for name in cluster.api.objects["events"]]
        assert len(sequences) == len(set(sequences))


@pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER], ids=["before", "after"])
@pytest.mark.parametrize("at", [2, 5])
async def test_transactions_that_are_lost_make_no_second_job_and_leave_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, at: int
) -> None:
    """Nobody but the job itself tries again at once: the reconciler does with its next look."""
    for method in (Database.read, Database.write):
        monkeypatch.setitem(method.__kwdefaults__ or {}, "patience", 0.0)
    async with (
        training_on(tmp_path, TrainerPods(0.02), training_jobs=True) as (orchestrator, cluster),
        reconciling(tmp_path, orchestrator, cluster),
    ):
        assert orchestrator.database is not None
        faults = StoreFaults(orchestrator.database, at, fault)
        apply(cluster, sft_config())
        await cluster.until(lambda: status(cluster).get("state") == "Succeeded")
        assert faults.hit
        StoreFaults(orchestrator.database, at, fault)
        cluster.api.begin_deletion("trainingjobs", cluster.api.objects["trainingjobs"]["mine"])
        await cluster.until(lambda: not cluster.api.objects["trainingjobs"])
        await nothing_left(cluster)
        reasons = [event["reason"] for event in cluster.api.objects["events"].values()]
        assert reasons.count("Queued") == reasons.count("Succeeded") == 1
        assert not await orchestrator.database.read(lambda c: store.find(c, "mine"), patience=10.0)


async def test_a_resource_that_is_deleted_while_no_orchestrator_runs_goes_when_one_does(tmp_path: Path) -> None:
    async with training_on(tmp_path, TrainerPods(0.05), training_jobs=True) as (orchestrator, cluster):
        async with reconciling(tmp_path, orchestrator, cluster):
            apply(cluster, sft_config(max_steps=400))
            await cluster.until(lambda: status(cluster).get("step"))
        cluster.api.begin_deletion("trainingjobs", cluster.api.objects["trainingjobs"]["mine"])
        assert cluster.api.objects["trainingjobs"], "its finalizer keeps it"
        async with reconciling(tmp_path, orchestrator, cluster):
            await cluster.until(lambda: not cluster.api.objects["trainingjobs"])
            await nothing_left(cluster)


@pytest.mark.parametrize(
    ("name", "spec", "why"),
    [
        ("a" * 64, sft_config(), "1 to 63 characters"),
        ("with.dots", sft_config(), "lowercase letters, digits and inner hyphens"),
        ("big", sft_config(system_prompt="x" * (1 << 20)), "put data into files"),
        ("mine", {**sft_config(), "labels": {"surogate.dev/owner": "alice"}}, "must not begin with surogate.dev/"),
        ("taken", sft_config(), "jobs/taken"),
    ],
)
async def test_what_no_job_can_be_made_of_says_why_and_goes_when_it_is_deleted(
    tmp_path: Path, name: str, spec: Object, why: str
) -> None:
    async with (
        training_on(tmp_path, training_jobs=True) as (orchestrator, cluster),
        reconciling(tmp_path, orchestrator, cluster),
    ):
        await orchestrator.create(sft_config(output_dir="other"), job_id="taken")
        cluster.api.add("trainingjobs", {"metadata": {"name": name}, "spec": spec})
        await cluster.until(lambda: status(cluster, name).get("state") == "Refused")
        assert why in status(cluster, name)["message"]
        cluster.api.begin_deletion("trainingjobs", cluster.api.objects["trainingjobs"][name])
        await cluster.until(lambda: not cluster.api.objects["trainingjobs"])
        ended = await orchestrator.ended("jobs/taken")
        assert ended.state == State.STATE_SUCCEEDED, "it is not the resource's"


async def test_conflicts_and_one_resource_that_cannot_be_read_keep_no_other_waiting(tmp_path: Path) -> None:
    conflict = StatusError(409, "Conflict", "the object has been modified; please apply your changes to the latest")
    async with training_on(tmp_path, training_jobs=True) as (orchestrator, cluster):
        conflicts = [conflict] * 3
        cluster.api.refuses = lambda request: (
            conflicts.pop() if request.method == "PATCH" and request.plural == "trainingjobs" and conflicts else None
        )
        async with reconciling(tmp_path, orchestrator, cluster):
            apply(cluster, {"kind": "sft", "train": {"model": ["\ud800"]}}, "broken")
            apply(cluster, sft_config())
            await cluster.until(lambda: status(cluster).get("state") == "Succeeded")
            assert not conflicts


async def test_applying_the_same_again_changes_nothing(tmp_path: Path) -> None:
    """What GitOps does all the time: no write, no event, once the job has ended and while it runs."""
    async with (
        training_on(tmp_path, training_jobs=True) as (orchestrator, cluster),
        reconciling(tmp_path, orchestrator, cluster),
    ):
        spec = sft_config()
        apply(cluster, spec)
        await cluster.until(lambda: status(cluster).get("state") == "Succeeded")
        assert spec_of(cluster) == spec, "nothing is put into what somebody keeps in a repository"
        await nothing_left(cluster)
        before = len([one for one in cluster.api.requests if one.method != "GET"])
        await asyncio.sleep(3.5)
        assert len([one for one in cluster.api.requests if one.method != "GET"]) == before
