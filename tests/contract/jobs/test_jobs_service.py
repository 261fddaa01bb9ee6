"""JobService as clients see it: creation, idempotency, pages, watching, cancelling, the queue."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import Connection, event
from sqlalchemy.exc import OperationalError

from orchestrator_svc.jobs.context import JobContext
from orchestrator_svc.jobstore import store
from orchestrator_svc.launchers.base import WorkerPool
from orchestrator_svc.service import SERVICE
from surogate.config.service import ServiceSettings
from surogate.errors import (
    AlreadyExistsError,
    BusyError,
    CancelledError,
    ConfigError,
    FailedPreconditionError,
    InvalidInputError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    UnavailableError,
)
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.structs import to_struct
from surogate.v1 import job_pb2, job_pb2_grpc
from tests.helpers.grpo.grpo_job import job_config
from tests.helpers.grpo.pools import EmptyLauncher
from tests.helpers.orchestrator import ENDED, Orchestrator, State, orchestrating, sft_config
from tests.helpers.rpc import serving


class Jobs:
    """A runner under the test's control."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.go = asyncio.Event()
        self.at_once = 0
        self.most_at_once = 0

    async def run(self, ctx: JobContext, pool: WorkerPool) -> None:
        """Says that it trains, does three steps, and waits for `go`."""
        self.order.append(ctx.job_id)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await ctx.running()
            for step in (1, 2, 3):
                await ctx.emit(job_pb2.StepCompleted(step=step, max_steps=3, metrics={"loss": 1 / step}))
            waits = [asyncio.create_task(event.wait()) for event in (self.go, ctx.cancelled)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if ctx.cancelled.is_set():
                await ctx.emit(job_pb2.CheckpointSaved(step=3, path="/saved"))
                raise CancelledError("cancelled")
        finally:
            self.at_once -= 1


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@pytest_asyncio.fixture
async def orchestrator(tmp_path: Path, store_url: str, jobs: Jobs) -> AsyncIterator[Orchestrator]:
    settings = {"max_queued_jobs": 3, "store_url": store_url}
    async with orchestrating(tmp_path, {"sft": jobs.run}, EmptyLauncher(), **settings) as orchestrator:
        yield orchestrator


async def test_a_job_runs_though_the_answer_to_its_claim_was_lost(orchestrator: Orchestrator, jobs: Jobs) -> None:
    assert orchestrator.database is not None
    claims: list[Connection] = []

    def notice(connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE jobs SET owner=") and not claims:
            claims.append(connection)

    def lose(connection: Connection) -> None:
        if claims == [connection]:
            claims.append(connection)
            connection.connection.driver_connection.commit()  # type: ignore[union-attr]
            raise OperationalError("COMMIT", {}, Exception("the connection is lost"))

    event.listen(orchestrator.database.engine, "before_cursor_execute", notice)
    event.listen(orchestrator.database.engine, "commit", lose)
    job = await orchestrator.create(sft_config())
    await orchestrator.until_step(job.name, 3)
    jobs.go.set()
    assert (await orchestrator.ended(job.name)).state == State.STATE_SUCCEEDED
    assert len(claims) == 2
    assert len(jobs.order) == 1


async def test_a_job_runs_and_its_history_tells_all_of_it(orchestrator: Orchestrator, jobs: Jobs) -> None:
    jobs.go.set()
    job = await orchestrator.create(sft_config(), job_id="first", labels={"team": "blue"})
    assert job.name == "jobs/first"
    assert job.kind == State.KIND_SFT
    assert job.output_dir == str(orchestrator.folder / "out")
    history = await orchestrator.history(job.name)
    assert [event.sequence for event in history] == list(range(1, len(history) + 1))
    states = [event.state_changed.state for event in history if event.HasField("state_changed")]
    assert states == [State.STATE_QUEUED, State.STATE_STARTING, State.STATE_RUNNING, State.STATE_SUCCEEDED]
    done = await orchestrator.get(job.name)
    assert (done.state, done.step, done.max_steps) == (State.STATE_SUCCEEDED, 3, 3)
    assert done.metrics["loss"] == pytest.approx(1 / 3)
    assert done.create_time.ToNanoseconds() <= done.start_time.ToNanoseconds() <= done.end_time.ToNanoseconds()
    assert dict(done.labels) == {"team": "blue"}


async def test_a_bad_configuration_names_the_key_and_stores_nothing(orchestrator: Orchestrator) -> None:
    with pytest.raises(ConfigError) as caught:
        await orchestrator.create(sft_config(learning_rat=1e-3))
    assert [violation.field for violation in caught.value.violations] == ["train.learning_rat"]
    assert not (await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest())).jobs


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300])
async def test_numbers_that_json_does_not_have_name_their_key(orchestrator: Orchestrator, number: float) -> None:
    config = to_struct(sft_config())
    config["train"]["save_steps"] = number
    with pytest.raises(ConfigError) as caught:
        await orchestrator.stub.CreateJob(job_pb2.CreateJobRequest(config=config))
    assert [violation.field for violation in caught.value.violations] == ["train.save_steps"]


async def test_a_thousand_faults_reach_the_client(orchestrator: Orchestrator) -> None:
    keys = {f"unknown_{index}": index for index in range(1000)}
    with pytest.raises(ConfigError, match="unknown key") as caught:
        await orchestrator.create(sft_config(**keys))
    assert len(caught.value.violations) > 10
    assert caught.value.violations[0].field.startswith("train.unknown_")
    with pytest.raises(ConfigError) as caught:
        await orchestrator.create(sft_config(learning_rate="x" * 500_000))
    assert [violation.field for violation in caught.value.violations] == ["train.learning_rate"]


async def test_data_does_not_belong_into_configurations(orchestrator: Orchestrator) -> None:
    with pytest.raises(InvalidInputError, match="put data into files") as caught:
        await orchestrator.create(sft_config(system="x" * 2_000_000))
    assert [violation.field for violation in caught.value.violations] == ["config"]


async def test_functions_of_modules_that_are_not_allowed_are_refused(orchestrator: Orchestrator) -> None:
    advantage = {"type": "custom", "import_path": "os:system", "kwargs": {"command": "true"}}
    with pytest.raises(ConfigError, match="custom_modules") as caught:
        await orchestrator.create(job_config("m", max_steps=1, advantage=advantage), validate_only=True)
    assert [violation.field for violation in caught.value.violations] == ["orch.advantage.import_path"]


async def test_a_job_begins_with_no_more_replicas_than_the_server_gives(orchestrator: Orchestrator) -> None:
    for number, wrong in ((64, False), (65, True), (1024, True)):
        config = {**job_config("m", max_steps=1), "infer": {"dp": number}}
        if wrong:
            with pytest.raises(ConfigError, match=rf"infer.dp: is {number}; .* 64 replicas at most \(max_replicas\)"):
                await orchestrator.create(config, validate_only=True)
        else:
            await orchestrator.create(config, validate_only=True)


async def test_validate_only_returns_the_resolved_job_and_starts_nothing(orchestrator: Orchestrator) -> None:
    job = await orchestrator.create(sft_config(), validate_only=True)
    assert job.config["train"]["resume_from_checkpoint"] is True
    assert (job.state, job.max_steps) == (State.STATE_UNSPECIFIED, 5)
    assert not (await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest())).jobs
    await orchestrator.create(sft_config(output_dir="o"), job_id="mine")
    again = await orchestrator.create(sft_config(output_dir="o"), validate_only=True)
    assert again.config["train"]["output_dir"] == "o"


async def test_request_ids_make_creation_idempotent(orchestrator: Orchestrator) -> None:
    first = await orchestrator.create(sft_config(), request_id="r-1")
    again = await orchestrator.create(sft_config(), request_id="r-1")
    assert again.name == first.name
    with pytest.raises(AlreadyExistsError, match="use a new request_id"):
        await orchestrator.create(sft_config(max_steps=6), request_id="r-1")


async def test_request_ids_are_remembered_over_a_restart(tmp_path: Path, jobs: Jobs) -> None:
    async with orchestrating(tmp_path, {"sft": jobs.run}, EmptyLauncher()) as before:
        first = await before.create(sft_config(), request_id="r-1")
    async with orchestrating(tmp_path, {"sft": jobs.run}, EmptyLauncher()) as after:
        assert (await after.create(sft_config(), request_id="r-1")).name == first.name


@pytest.mark.parametrize("job_id", ["Upper", "-a", "a-", "a_b", "a" * 64])
async def test_job_ids_have_a_form(orchestrator: Orchestrator, job_id: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        await orchestrator.create(sft_config(), job_id=job_id)
    assert caught.value.violations[0].field == "job_id"


async def test_paths_outside_of_the_output_root_are_refused(orchestrator: Orchestrator) -> None:
    for folder in ("../elsewhere", "~/elsewhere"):
        with pytest.raises(ConfigError, match="output root"):
            await orchestrator.create(sft_config(output_dir=folder))
    with pytest.raises(ConfigError, match="where other files lie"):
        await orchestrator.create(sft_config(output_dir="~"))
    with pytest.raises(ConfigError, match="another user's home"):
        await orchestrator.create(sft_config(output_dir="~nobody/elsewhere"))


@pytest.mark.parametrize("url", ["s3://others/model", "s3://ours-too/m", "s3://ours/a/../../b", "s3://ours"])
async def test_urls_outside_of_those_that_are_allowed_are_refused(tmp_path: Path, jobs: Jobs, url: str) -> None:
    settings = {"allowed_urls": ["s3://ours/"]}
    async with orchestrating(tmp_path, {"sft": jobs.run}, EmptyLauncher(), **settings) as orchestrator:
        await orchestrator.create(sft_config(model="s3://ours/m", checkpoint_dir="s3://ours/c"), validate_only=True)
        with pytest.raises(ConfigError, match="not below a URL that this server allows") as caught:
            await orchestrator.create(sft_config(checkpoint_dir=url), validate_only=True)
    assert [violation.field for violation in caught.value.violations] == ["train.checkpoint_dir"]


async def test_what_jobs_may_read_send_and_run_is_bounded(tmp_path: Path, jobs: Jobs) -> None:
    shared, root = tmp_path / "shared", tmp_path / "root"
    for folder in (shared, root, shared / "model"):
        folder.mkdir()
    (shared / "link").symlink_to("/etc")

    def reading(path: str) -> dict[str, Any]:
        entry = {"path": path, "type": "instruction", "instruction_field": "q", "output_field": "a"}
        return sft_config(str(shared / "model"), datasets=[entry])

    settings = {"input_roots": [shared], "output_root": root}
    async with orchestrating(tmp_path, {"sft": jobs.run}, EmptyLauncher(), **settings) as orchestrator:

        async def refused(config: dict[str, Any]) -> list[str]:
            with pytest.raises(ConfigError) as caught:
                await orchestrator.create(config, validate_only=True)
            return [violation.field for violation in caught.value.violations]

        await orchestrator.create(reading("org/data"), validate_only=True)
        for path in ("/etc/passwd", f"{shared}/link/passwd", f"{shared}/../secret", "~/secret", "../x.jsonl"):
            assert await refused(reading(path)) == ["train.datasets.0.path"]
        env = {"id": "mine", "address": "evil.example:1", "token_env": "AWS_SECRET_ACCESS_KEY"}
        assert await refused(job_config("org/m", env=[env])) == ["orch.env.0.token_env"]
        meant = [{**env, "token_env": "REWARD_TOKEN"}]
        await orchestrator.create(job_config("org/m", env=meant), validate_only=True)
        trusting = {**job_config("org/m"), "infer": {"trust_remote_code": True}}
        assert await refused(trusting) == ["infer.trust_remote_code"]


async def test_one_folder_has_one_job_at_a_time(orchestrator: Orchestrator) -> None:
    await orchestrator.create(sft_config(), job_id="a")
    with pytest.raises(FailedPreconditionError, match="is being written by jobs/a"):
        await orchestrator.create(sft_config(), job_id="b")


async def test_jobs_wait_for_their_turn_in_order(orchestrator: Orchestrator, jobs: Jobs) -> None:
    names = []
    for index in range(3):
        names.append((await orchestrator.create(sft_config(output_dir=f"out-{index}"), job_id=f"j{index}")).name)
        await orchestrator.until(names[0], State.STATE_RUNNING)
    assert (await orchestrator.get(names[2])).status_message == "waiting for its turn: number 2 in the queue"
    jobs.go.set()
    for name in names:
        assert (await orchestrator.ended(name)).state == State.STATE_SUCCEEDED
    assert jobs.order == ["j0", "j1", "j2"]
    assert jobs.most_at_once == 1


async def test_a_full_queue_says_when_to_come_back(orchestrator: Orchestrator) -> None:
    first = await orchestrator.create(sft_config(output_dir="running"))
    await orchestrator.until(first.name, State.STATE_RUNNING)
    for index in range(3):
        await orchestrator.create(sft_config(output_dir=f"out-{index}"))
    with pytest.raises(BusyError) as caught:
        await orchestrator.create(sft_config(output_dir="one-too-many"))
    assert caught.value.retry_after > 0


async def test_a_job_whose_store_failed_is_taken_up_again(tmp_path: Path) -> None:
    attempts = []

    async def run(ctx: JobContext, _pool: WorkerPool) -> None:
        attempts.append(ctx.resumed)
        if len(attempts) == 1:
            raise UnavailableError("the job store does not answer", reason="STORE_UNAVAILABLE")

    async with orchestrating(tmp_path, {"sft": run}, EmptyLauncher(), lease_seconds=0.6) as orchestrator:
        job = await orchestrator.create(sft_config())
        done = await orchestrator.ended(job.name)
    assert done.state == State.STATE_SUCCEEDED
    assert attempts == [False, True]


async def test_cancelling_a_running_job_lets_it_save(orchestrator: Orchestrator) -> None:
    job = await orchestrator.create(sft_config())
    await orchestrator.until_step(job.name, 3)
    assert (await orchestrator.cancel(job.name)).state == State.STATE_CANCELLING
    ended = await orchestrator.ended(job.name)
    assert (ended.state, ended.checkpoint) == (State.STATE_CANCELLED, "/saved")
    assert (await orchestrator.cancel(job.name)).state == State.STATE_CANCELLED


async def test_cancelling_a_queued_job_ends_it_at_once(orchestrator: Orchestrator, jobs: Jobs) -> None:
    first = await orchestrator.create(sft_config(output_dir="a"))
    await orchestrator.until(first.name, State.STATE_RUNNING)
    second = await orchestrator.create(sft_config(output_dir="b"), job_id="second")
    assert (await orchestrator.cancel(second.name)).state == State.STATE_CANCELLED
    jobs.go.set()
    await orchestrator.ended(first.name)
    assert "second" not in jobs.order


async def test_watchers_see_every_event_once_from_wherever_they_begin(orchestrator: Orchestrator, jobs: Jobs) -> None:
    job = await orchestrator.create(sft_config())
    watchers = [asyncio.create_task(orchestrator.history(job.name)) for _ in range(5)]
    await orchestrator.until_step(job.name, 3)
    late = asyncio.create_task(orchestrator.history(job.name))
    jobs.go.set()
    full = await late
    for watcher in watchers:
        assert await watcher == full
    rest = [event async for event in orchestrator.watch(job.name, after=4)]
    assert rest == full[4:]
    with pytest.raises(OutOfRangeError):
        await anext(aiter(orchestrator.watch(job.name, after=len(full) + 1)))
    with pytest.raises(InvalidInputError, match="after_sequence is -1"):
        await anext(aiter(orchestrator.watch(job.name, after=-1)))


async def test_deleting_a_job_forgets_it(orchestrator: Orchestrator, jobs: Jobs) -> None:
    job = await orchestrator.create(sft_config())
    with pytest.raises(FailedPreconditionError, match="cancel it first"):
        await orchestrator.stub.DeleteJob(job_pb2.DeleteJobRequest(name=job.name))
    jobs.go.set()
    assert (await orchestrator.ended(job.name)).state in ENDED
    await orchestrator.stub.DeleteJob(job_pb2.DeleteJobRequest(name=job.name))
    for call in (orchestrator.get(job.name), orchestrator.cancel(job.name), orchestrator.history(job.name)):
        with pytest.raises(NotFoundError):
            await call


async def test_listing(orchestrator: Orchestrator, jobs: Jobs) -> None:
    jobs.go.set()
    for index in range(5):
        job = await orchestrator.create(sft_config(), job_id=f"j{index}", labels={"odd": str(index % 2)})
        await orchestrator.ended(job.name)
    first = await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest(page_size=3))
    second = await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest(page_size=3, page_token=first.next_page_token))
    assert [job.name[-1] for job in [*first.jobs, *second.jobs]] == ["4", "3", "2", "1", "0"]
    assert not second.next_page_token
    odd = await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest(labels={"odd": "1"}))
    assert [job.name[-1] for job in odd.jobs] == ["3", "1"]
    none = await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest(states=[State.STATE_FAILED]))
    assert not none.jobs
    with pytest.raises(InvalidInputError, match="page_size"):
        await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest(page_size=1001))
    with pytest.raises(InvalidInputError, match="labels: are more than 64"):
        await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest(labels={str(index): "" for index in range(2000)}))


@pytest.mark.parametrize("number", [99, -1, 0])
async def test_states_and_kinds_that_there_are_not_are_refused_by_name(orchestrator: Orchestrator, number: int) -> None:
    with pytest.raises(InvalidInputError, match=f"states: has {number}, which is none of STATE_QUEUED") as caught:
        await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest(states=[State.STATE_FAILED, number]))  # type: ignore[list-item]
    assert [violation.field for violation in caught.value.violations] == ["states"]
    with pytest.raises(InvalidInputError, match=f"kinds: has {number}, which is none of KIND_PT"):
        await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest(kinds=[number]))  # type: ignore[list-item]


@pytest.mark.parametrize("text", ["[" * 50_000, '[1, "a"]', "{}", f'[{10**400}, "a", "%s"]'])
async def test_page_tokens_of_other_makers_are_refused(orchestrator: Orchestrator, text: str) -> None:
    filters = store.digest([], [], {})[:16]
    token = base64.urlsafe_b64encode(text.replace("%s", filters).encode()).decode()
    with pytest.raises(InvalidInputError, match="page_token is not one that this server gave"):
        await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest(page_token=token))


async def test_a_page_fits_into_a_message_that_every_client_takes(orchestrator: Orchestrator, jobs: Jobs) -> None:
    jobs.go.set()
    for index in range(5):
        job = await orchestrator.create(sft_config(system=f"{index}" * 1_000_000))
        await orchestrator.ended(job.name)
    pages: list[job_pb2.ListJobsResponse] = []
    while not pages or pages[-1].next_page_token:
        token = pages[-1].next_page_token if pages else ""
        pages.append(await orchestrator.stub.ListJobs(job_pb2.ListJobsRequest(page_size=1000, page_token=token)))
    assert max(page.ByteSize() for page in pages) < 4 << 20
    assert [job.config["train"]["system"][0] for page in pages for job in page.jobs] == ["4", "3", "2", "1", "0"]


@asynccontextmanager
async def clients(orchestrator: Orchestrator, tokens: Path, *names: str) -> AsyncIterator[list[Orchestrator]]:
    """The same orchestrator as clients with these tokens see it."""

    def register(server: Any) -> None:
        server.add(job_pb2_grpc.add_JobServiceServicer_to_server, orchestrator.servicer, SERVICE)

    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(register, ServiceSettings(token_file=tokens)))
        opened = [open_channel(server.address, ClientSecurity(token=f"{name}-token")) for name in names]
        channels = [await stack.enter_async_context(channel) for channel in opened]
        yield [Orchestrator(job_pb2_grpc.JobServiceStub(channel), orchestrator.folder) for channel in channels]


async def test_a_client_with_a_named_token_changes_its_own_jobs_alone(
    orchestrator: Orchestrator, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("alice alice-token\nbob bob-token\noperator-token\n")
    async with clients(orchestrator, tokens, "alice", "bob", "operator") as (alice, bob, operator):
        job = await alice.create(sft_config(), job_id="hers")
        assert job.labels["surogate.dev/created-by"] == "alice"
        other = await operator.create(sft_config(output_dir="other"), job_id="nobodys")
        assert (await bob.get(job.name)).name == job.name, "all see all"
        changes: list[Any] = [
            bob.stub.CancelJob(job_pb2.CancelJobRequest(name=job.name)),
            bob.stub.DeleteJob(job_pb2.DeleteJobRequest(name=job.name)),
            bob.stub.ScaleJob(job_pb2.ScaleJobRequest(name=job.name, inference=2)),
            bob.stub.ReplaceReward(job_pb2.ReplaceRewardRequest(name=job.name, address="reward:1")),
        ]
        for change in changes:
            with pytest.raises(PermissionDeniedError, match="jobs/hers was created by alice") as refused:
                await change
            assert refused.value.reason == "NOT_YOUR_JOB"
        with pytest.raises(PermissionDeniedError, match="was not created with a named token"):
            await alice.cancel(other.name)
        with pytest.raises(NotFoundError):
            await alice.cancel("jobs/none")
        await alice.cancel(job.name)
        await alice.ended(job.name)
        await operator.stub.DeleteJob(job_pb2.DeleteJobRequest(name=job.name))
        await operator.cancel(other.name)


async def test_labels_of_our_own_are_not_taken_from_clients(orchestrator: Orchestrator) -> None:
    with pytest.raises(
        InvalidInputError, match=r"labels\.surogate\.dev/created-by: must not begin with surogate\.dev/"
    ):
        await orchestrator.create(sft_config(), labels={"surogate.dev/created-by": "somebody"})
