"""GRPO jobs in pods: replicas that die, come and go; what people are told of pods, and what pods have written."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("kubernetes", reason="needs the extra `kubernetes`")

from surogate.errors import ConfigError, FailedPreconditionError, InvalidInputError, NotFoundError
from surogate.rpc.channel import ClientSecurity
from surogate.rpc.server import RpcServer
from surogate.v1 import job_pb2, reward_pb2_grpc
from tests.contract.kubernetes.test_kubernetes_launcher import nothing_left, notices
from tests.helpers.certificates import Authority
from tests.helpers.cluster.kube_jobs import GrpoPods, TrainerPods, reinforcing_on, training_on
from tests.helpers.grpo.grpo_fakes import FakeReward
from tests.helpers.grpo.grpo_job import job_config
from tests.helpers.orchestrator import Orchestrator, orchestrating, sft_config
from tests.helpers.waiting import PATIENCE

pytestmark = pytest.mark.usefixtures("api_server")
State = job_pb2.Job


def grpo_config(model: str, *, replicas: int = 1, **orch: Any) -> dict[str, Any]:
    return {**job_config(model, **orch), "infer": {"dp": replicas}}


async def finished(orchestrator: Orchestrator, name: str) -> job_pb2.Job:
    ended = await orchestrator.ended(name)
    assert ended.state == State.STATE_SUCCEEDED, ended.status_message
    return ended


async def test_a_replica_that_dies_is_replaced_and_takes_the_weights_before_traffic(tmp_path: Path) -> None:
    pods = GrpoPods(seconds=0.05)
    async with reinforcing_on(tmp_path, pods) as (orchestrator, cluster, model):
        job = await orchestrator.create(grpo_config(model, replicas=2, max_steps=500), job_id="rl")
        await orchestrator.until_step(job.name, 2)
        dead = cluster.pod("inference", 1)
        await cluster.fail(dead, 137, reason="OOMKilled")
        new = await cluster.until(lambda: len(pods.replicas) == 3 and list(pods.replicas.values())[2])
        await cluster.until(lambda: new.served)
        assert new.version >= 2, "it serves, and not the weights that it was started with"
        await orchestrator.cancel(job.name)
        said = notices(await orchestrator.history(job.name))
        assert "inference-1 was killed for using more memory than its limit (1Gi): raise it; starting it again" in said
        await nothing_left(cluster)


async def test_a_trainer_pod_that_dies_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    pods = GrpoPods()
    async with reinforcing_on(tmp_path, pods) as (orchestrator, cluster, model):
        config = grpo_config(model, max_steps=8, ckpt={"interval": 2})
        job = await orchestrator.create(config, job_id="rl")
        await orchestrator.until_step(job.name, 3)
        await cluster.fail(cluster.pod("trainer"), 1)
        ended = await finished(orchestrator, job.name)
        assert (ended.step, len(pods.trainers)) == (8, 2)
        # What was replayed gave the same weights; the versions go on without a gap.
        history = [item for trainer in pods.trainers for item in trainer.history]
        assert sorted(set(history)) == sorted(dict(history).items())
        assert ended.policy_version == 8


async def test_replicas_are_added_and_drained_while_the_job_runs(tmp_path: Path) -> None:
    pods = GrpoPods(seconds=0.05)
    async with reinforcing_on(tmp_path, pods) as (orchestrator, cluster, model):
        job = await orchestrator.create(grpo_config(model, max_steps=500), job_id="rl")
        await orchestrator.until_step(job.name, 1)
        await orchestrator.stub.ScaleJob(job_pb2.ScaleJobRequest(name=job.name, inference=3))
        new = await cluster.until(lambda: len(pods.replicas) == 3 and list(pods.replicas.values())[1:])
        await cluster.until(lambda: all(replica.served and replica.version for replica in new))
        await orchestrator.stub.ScaleJob(job_pb2.ScaleJobRequest(name=job.name, inference=1))
        await cluster.until(lambda: len(cluster.api.find("jobs", component="inference")) == 1)
        [left] = cluster.api.find("jobs", component="inference")
        assert left["metadata"]["labels"]["surogate.dev/index"] == "0"
        await orchestrator.cancel(job.name)
        events = await orchestrator.history(job.name)
        assert "replica inference-2 is drained and gone: 2 are left" in notices(events)
        assert not any("inference" in event.notice.text and "failed" in event.notice.text for event in events)
        await nothing_left(cluster)


async def test_the_scale_outlives_the_orchestrator(tmp_path: Path) -> None:
    pods = GrpoPods(seconds=0.05)
    async with reinforcing_on(tmp_path, pods) as (orchestrator, cluster, model):
        job = await orchestrator.create(grpo_config(model, max_steps=500), job_id="rl")
        await orchestrator.until_step(job.name, 1)
        await orchestrator.stub.ScaleJob(job_pb2.ScaleJobRequest(name=job.name, inference=2))
        await cluster.until(lambda: len(pods.replicas) == 2)
        before = {pod["metadata"]["uid"] for pod in cluster.pods}
        assert orchestrator.runner is not None
        await orchestrator.runner.stop()
        orchestrator.runner.start()
        await orchestrator.until_step(job.name, (await orchestrator.get(job.name)).step + 2)
        assert {pod["metadata"]["uid"] for pod in cluster.pods} == before
        assert len((await orchestrator.get(job.name)).workers) == 4
        await orchestrator.cancel(job.name)
        await orchestrator.ended(job.name)
        await nothing_left(cluster)


async def test_what_cannot_be_scaled_is_refused(tmp_path: Path) -> None:
    async with training_on(tmp_path, TrainerPods(0.05)) as (orchestrator, _):
        job = await orchestrator.create(sft_config(max_steps=40), job_id="one")
        for inference, error in ((0, InvalidInputError), (65, InvalidInputError), (2, FailedPreconditionError)):
            with pytest.raises(error):
                await orchestrator.stub.ScaleJob(job_pb2.ScaleJobRequest(name=job.name, inference=inference))


async def test_why_a_pod_waits_reaches_who_watches(tmp_path: Path) -> None:
    async with training_on(tmp_path) as (orchestrator, cluster):
        cluster.holds = True
        job = await orchestrator.create(sft_config(), job_id="one")
        pod = await cluster.until(lambda: next(iter(cluster.pods), None))
        message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available: 3 No."
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        cluster.set_status(pod, conditions=[condition])
        async with asyncio.timeout(PATIENCE):
            async for event in orchestrator.watch(job.name):
                if "cannot be scheduled" in event.notice.text:
                    break
        text = "cannot be scheduled: of 3 nodes, 3 have too little nvidia.com/gpu"
        assert event.notice.text == f"trainer-0 {text}" and event.notice.component == "trainer-0"
        assert (await orchestrator.get(job.name)).workers[0].status_message == text
        cluster.set_status(pod, conditions=[])
        cluster.holds = False
        ended = await finished(orchestrator, job.name)
        assert not ended.workers


async def test_quota_is_told_from_the_jobs_events(tmp_path: Path) -> None:
    async with training_on(tmp_path) as (orchestrator, cluster):
        if cluster.api.runs_jobs:
            pytest.skip("Kubernetes' own Job controller starves no Job")
        cluster.starves = True
        job = await orchestrator.create(sft_config(), job_id="one")
        made = await cluster.until(lambda: next(iter(cluster.api.objects["jobs"].values()), None))
        message = 'pods "x" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=8'
        event = {"metadata": {"name": "e"}, "reason": "FailedCreate", "message": message}
        about = {"kind": "Job", "namespace": cluster.api.namespace, "uid": made["metadata"]["uid"]}
        cluster.api.add("events", {**event, "involvedObject": about})
        async with asyncio.timeout(PATIENCE):
            async for told in orchestrator.watch(job.name):
                if "over the quota gpus" in told.notice.text:
                    break
        cluster.starves = False
        await finished(orchestrator, job.name)


async def test_a_queued_job_names_its_queue_and_starts_when_it_is_admitted(tmp_path: Path) -> None:
    async with training_on(tmp_path) as (orchestrator, cluster):
        if cluster.api.is_dated:
            pytest.skip("this API server is too old for suspended Jobs")
        job = await orchestrator.create({**sft_config(), "cluster": {"queue": "research"}}, job_id="one")
        async with asyncio.timeout(PATIENCE):
            async for event in orchestrator.watch(job.name):
                if "waits for quota in the queue research" in event.notice.text:
                    break
        [made] = cluster.api.objects["jobs"].values()
        cluster.api.change_spec("jobs", made["metadata"]["name"], suspend=False)
        await finished(orchestrator, job.name)


async def test_a_deadline_fails_the_job_in_words(tmp_path: Path) -> None:
    async with training_on(tmp_path, TrainerPods(0.05)) as (orchestrator, cluster):
        config = {**sft_config(max_steps=400), "cluster": {"max_runtime": 7}}
        job = await orchestrator.create(config, job_id="one")
        await orchestrator.until_step(job.name, 1)
        [made] = cluster.api.objects["jobs"].values()
        if not cluster.api.runs_jobs:  # which would see to it
            cluster.end_job(made, "DeadlineExceeded", "Job was active longer than specified deadline")
        ended = await orchestrator.ended(job.name)
        assert ended.state == State.STATE_FAILED
        assert "ran longer than it may (cluster.max_runtime: 7 s)" in ended.status_message
        await nothing_left(cluster)


async def logs(orchestrator: Orchestrator, name: str, **request: Any) -> list[tuple[str, str]]:
    call = orchestrator.stub.ReadLogs(job_pb2.ReadLogsRequest(name=name, **request), timeout=PATIENCE)
    return [(line.worker, line.text) async for line in call]


async def test_logs_of_pods_while_they_run_and_after(tmp_path: Path) -> None:
    async with training_on(tmp_path, TrainerPods(0.05)) as (orchestrator, cluster):
        job = await orchestrator.create(sft_config(max_steps=12), job_id="one")
        await orchestrator.until_step(job.name, 1)
        said = cluster.said.setdefault(cluster.pod("trainer")["metadata"]["name"], [])
        said += ["one", "two", "three"]
        assert await logs(orchestrator, job.name, component="trainer") == [
            ("trainer-0", text) for text in ("one", "two", "three")
        ]
        following = asyncio.create_task(logs(orchestrator, job.name, follow=True))
        await asyncio.sleep(0.1)
        said.append("four")
        assert ("trainer-0", "four") in await following
        await finished(orchestrator, job.name)
        assert [text for _, text in await logs(orchestrator, job.name)] == ["one", "two", "three", "four"]
        with pytest.raises(NotFoundError, match="there are: trainer-0"):
            await logs(orchestrator, job.name, component="reward")


async def test_a_reward_service_of_the_authors_image_scores_in_a_pod(
    tmp_path: Path,
) -> None:
    pods = GrpoPods()
    settings = {"allowed_images": ["registry/team/*"]}
    async with reinforcing_on(tmp_path, pods, **settings) as (orchestrator, cluster, model):
        own = {"id": "fake", "image": "registry/team/reward:1"}
        with pytest.raises(ConfigError, match=r"orch\.env\.0\.image: 'evil:1' is not allowed"):
            await orchestrator.create(grpo_config(model, env=[{**own, "image": "evil:1"}]))
        job = await orchestrator.create(grpo_config(model, env=[own]), job_id="rl")
        pod = await cluster.until(lambda: cluster.api.find("pods", component="reward"))
        assert [one["spec"]["containers"][0]["image"] for one in pod] == ["registry/team/reward:1"]
        await finished(orchestrator, job.name)
        assert pods.hooks.calls["ScoreRollouts"]
        await nothing_left(cluster)


class Eavesdropper(GrpoPods):
    """Keeps what the reward service is told beside its requests."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, str]] = []

    def __call__(self, pod: Any, server: RpcServer) -> None:
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] != "reward":
            super().__call__(pod, server)
            return
        told = self.told

        class Reward(FakeReward):
            async def ScoreRollouts(self, request: Any, context: Any) -> Any:
                told.append(dict(context.invocation_metadata()))
                return await super().ScoreRollouts(request, context)

        reward = Reward(self.hooks)
        server.add(reward_pb2_grpc.add_RewardServiceServicer_to_server, reward, "surogate.v1.RewardService")
        server.add(reward_pb2_grpc.add_EnvironmentServiceServicer_to_server, reward, "surogate.v1.EnvironmentService")


async def test_an_image_of_the_authors_scores_where_workers_have_mtls_and_gets_neither_token_nor_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path)
    worker, own = authority.issue("worker", "workers"), authority.issue("orchestrator")
    theirs = {"tls_cert": worker.cert, "tls_key": worker.key, "tls_client_ca": authority.cert, "token_env": "WORKERS"}
    ours = ClientSecurity("a-token", authority.cert, own.cert, own.key, server_name="workers")
    monkeypatch.setenv("WORKERS", "a-token")
    monkeypatch.setattr(ClientSecurity, "from_env", lambda *_: ours)
    pods = Eavesdropper()
    async with reinforcing_on(tmp_path, pods, allowed_images=["mine:1"]) as (orchestrator, cluster, model):
        cluster.settings = lambda pod: {} if pod["spec"]["containers"][0]["image"] == "mine:1" else theirs
        template = tmp_path / "templates" / "reward.yaml"
        body = yaml.safe_load(template.read_text())
        container = body["spec"]["containers"][0]
        container["envFrom"] = [{"configMapRef": {"name": "surogate-workers"}}]
        container["volumeMounts"].append({"name": "tls", "mountPath": "/etc/surogate/tls"})
        body["spec"]["volumes"].append({"name": "tls", "secret": {"secretName": "surogate-worker-tls"}})
        template.write_text(yaml.safe_dump(body))
        job = await orchestrator.create(grpo_config(model, env=[{"id": "fake", "image": "mine:1"}]), job_id="rl")
        pod = (await cluster.until(lambda: cluster.api.find("pods", component="reward")))[0]
        assert "tls" not in {volume["name"] for volume in pod["spec"]["volumes"]}
        assert not pod["spec"]["containers"][0].get("envFrom")
        await finished(orchestrator, job.name)
        assert pods.told and not any("authorization" in metadata for metadata in pods.told)


async def test_an_image_of_ones_own_needs_pods(tmp_path: Path) -> None:
    async with orchestrating(tmp_path) as orchestrator:
        config = grpo_config("model", env=[{"id": "fake", "image": "mine:1"}])
        with pytest.raises(ConfigError, match=r"orch\.env\.0\.image: needs the launcher kubernetes"):
            await orchestrator.create(config)
