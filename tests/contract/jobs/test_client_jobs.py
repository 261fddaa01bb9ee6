"""The SDK against a real gRPC server with a fake orchestrator behind it."""

import threading

import pytest

import surogate
from surogate.client import AsyncClient, has_ended, state_name
from surogate.errors import ConfigError, NotFoundError, UnauthenticatedError, UnavailableError, Violation
from surogate.rpc.channel import ClientSecurity
from surogate.v1 import common_pb2, job_pb2
from tests.helpers.fake_jobs import FakeOrchestrator, serving_jobs

Job = job_pb2.Job
CONFIG = {"kind": "sft", "train": {"model": "m"}}


def test_launches_and_follows_a_job() -> None:
    with serving_jobs(FakeOrchestrator()) as address, surogate.Client(address) as client:
        job = client.create_job(CONFIG, job_id="mine")
        assert (job.name, state_name(job.state)) == ("jobs/mine", "queued")
        assert [event.step_completed.step for event in client.watch(job)] == [1, 2, 3, 4, 5]
        assert has_ended(client.get_job("mine"))
        assert client.wait("mine").state == Job.STATE_SUCCEEDED
        client.delete_job(job)
        with pytest.raises(NotFoundError, match="no job jobs/mine"):
            client.get_job(job)


def test_watching_goes_on_where_the_connection_broke() -> None:
    fake = FakeOrchestrator(break_after=2)
    with serving_jobs(fake) as address, surogate.Client(address) as client:
        client.create_job(CONFIG, job_id="mine")
        assert [event.sequence for event in client.watch("mine")] == [1, 2, 3, 4, 5]
        assert fake.watched_from == [0, 2, 4]


def test_watching_may_begin_anywhere_and_be_left() -> None:
    with serving_jobs(FakeOrchestrator()) as address, surogate.Client(address) as client:
        client.create_job(CONFIG, job_id="mine")
        assert [event.sequence for event in client.watch("mine", after_sequence=3)] == [4, 5]
        assert next(client.watch("mine")).sequence == 1
        assert client.cancel_job("mine").state == Job.STATE_CANCELLED


def test_lists_page_after_page() -> None:
    with serving_jobs(FakeOrchestrator()) as address, surogate.Client(address) as client:
        for number in range(5):
            client.create_job(CONFIG, job_id=f"job-{number}")
        assert [job.name for job in client.list_jobs()] == [f"jobs/job-{number}" for number in (4, 3, 2, 1, 0)]


def test_a_repeated_request_is_one_job() -> None:
    fake = FakeOrchestrator()
    with serving_jobs(fake) as address, surogate.Client(address) as client:
        first = client.create_job(CONFIG, request_id="r1")
        assert client.create_job(CONFIG, request_id="r1").name == first.name
        client.create_job(CONFIG, validate_only=True)
        assert len(fake.jobs) == 1


def test_errors_are_domain_errors() -> None:
    with serving_jobs(FakeOrchestrator()) as address, surogate.Client(address) as client:
        with pytest.raises(ConfigError) as caught:
            client.create_job({"kind": "sft", "train": {"modle": "m"}})
        assert caught.value.violations == (Violation("train.modle", "unknown key; did you mean model?"),)


def test_an_unreachable_server_is_unavailable() -> None:
    with surogate.Client("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError):
            client.get_job("mine")
        with pytest.raises(UnavailableError):
            list(client.watch("mine", patience=0.0))


def test_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENS", "old,new")
    with serving_jobs(FakeOrchestrator(), token_env="TOKENS") as address:
        with surogate.Client(address, ClientSecurity(token="new")) as client:
            assert list(client.list_jobs()) == []
        with surogate.Client(address, ClientSecurity()) as client, pytest.raises(UnauthenticatedError):
            list(client.list_jobs())


def test_generates_text() -> None:
    with serving_jobs(FakeOrchestrator()) as address, surogate.Client(address) as client:
        assert client.served_model().model == "echo"
        assert client.generate("say this back") == "say this back "
        pieces = list(client.stream([{"role": "user", "content": "two words"}]))
        assert [piece.text for piece in pieces] == ["two ", "words ", ""]
        assert pieces[-1].finish_reason == common_pb2.FINISH_REASON_STOP


async def test_the_same_for_asyncio() -> None:
    with serving_jobs(FakeOrchestrator()) as address:
        async with AsyncClient(address) as client:
            job = await client.create_job(CONFIG)
            assert [event.sequence async for event in client.watch(job)] == [1, 2, 3, 4, 5]
            assert (await client.wait(job)).state == Job.STATE_SUCCEEDED


def test_a_closed_client_stays_closed() -> None:
    client = surogate.Client("127.0.0.1:1")
    client.close()
    client.close()
    assert not any(thread.name == "surogate-client" for thread in threading.enumerate())
