"""What every call gets from the server and the channel: errors as exceptions, deadlines, limits, log context."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from surogate import errors
from surogate.config.service import MIB, ServiceSettings
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.rpc.server import RpcServer
from surogate.telemetry import log
from surogate.v1 import job_pb2, job_pb2_grpc, weights_pb2, weights_pb2_grpc
from tests.helpers.proxy import cutting
from tests.helpers.rpc import connected, serving

JOBS, WEIGHTS = "surogate.v1.JobService", "surogate.v1.WeightUpdateService"


class Jobs(job_pb2_grpc.JobServiceServicer):
    """Does what `act` says: returns its value, or raises."""

    def __init__(self, act: Callable[[str], Any]) -> None:
        self.act = act
        self.calls = 0

    async def GetJob(self, request: job_pb2.GetJobRequest, context: Any) -> job_pb2.Job:
        self.calls += 1
        result = self.act(request.name)
        return await result if asyncio.iscoroutine(result) else result

    async def WatchJob(self, request: job_pb2.WatchJobRequest, context: Any) -> AsyncIterator[job_pb2.JobEvent]:
        yield job_pb2.JobEvent(sequence=1)
        result = self.act(request.name)
        if asyncio.iscoroutine(result):
            await result


class Weights(weights_pb2_grpc.WeightUpdateServiceServicer):
    async def UploadWeights(self, request_iterator: Any, context: Any) -> weights_pb2.WeightUpdate:
        async for _ in request_iterator:
            raise errors.DataLossError("the checksum of chunk 0 is wrong", reason="CHECKSUM")
        return weights_pb2.WeightUpdate()


def jobs(servicer: Jobs) -> Callable[[RpcServer], None]:
    return lambda server: server.add(job_pb2_grpc.add_JobServiceServicer_to_server, servicer, JOBS)


def raising(error: Exception) -> Jobs:
    def act(_name: str) -> None:
        raise error

    return Jobs(act)


async def forever() -> job_pb2.Job:
    await asyncio.Event().wait()
    return job_pb2.Job()


async def test_a_servicers_exception_reaches_the_caller_as_itself() -> None:
    violation = errors.Violation("train.learning_rate", "must be > 0, is -1")
    async with connected(jobs(raising(errors.ConfigError.of([violation])))) as channel:
        with pytest.raises(errors.ConfigError, match="learning_rate") as caught:
            await job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest())
    assert caught.value.violations == (violation,)
    assert isinstance(caught.value.__cause__, grpc.aio.AioRpcError)


async def test_a_stream_fails_with_the_same_exceptions_after_its_first_answers() -> None:
    async with connected(jobs(raising(errors.NotFoundError("no jobs/x")))) as channel:
        seen = []
        with pytest.raises(errors.NotFoundError, match="no jobs/x"):
            async for event in job_pb2_grpc.JobServiceStub(channel).WatchJob(job_pb2.WatchJobRequest()):
                seen.append(event.sequence)  # noqa: PERF401 - what came before the error counts
    assert seen == [1]


async def test_a_client_stream_fails_with_the_same_exceptions() -> None:
    def register(server: RpcServer) -> None:
        server.add(weights_pb2_grpc.add_WeightUpdateServiceServicer_to_server, Weights(), WEIGHTS)

    async def chunks() -> AsyncIterator[weights_pb2.UploadWeightsRequest]:
        yield weights_pb2.UploadWeightsRequest(update_id="u")

    async with connected(register) as channel:
        with pytest.raises(errors.DataLossError, match="chunk 0") as caught:
            await weights_pb2_grpc.WeightUpdateServiceStub(channel).UploadWeights(chunks())
    assert caught.value.reason == "CHECKSUM"


async def test_an_unexpected_exception_is_internal_without_traceback() -> None:
    async with connected(jobs(raising(ZeroDivisionError("division by zero")))) as channel:
        with pytest.raises(errors.InternalError) as caught:
            await job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest())
    assert caught.value.message == "ZeroDivisionError: division by zero"


async def test_nobody_there_is_unavailable() -> None:
    async with open_channel("127.0.0.1:9") as channel:
        with pytest.raises(errors.UnavailableError):
            await job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest())


async def test_a_server_that_takes_its_time_over_a_new_connection_is_waited_for() -> None:
    async with (
        serving(jobs(Jobs(lambda name: job_pb2.Job(name=name)))) as server,
        cutting(server.address, delay=2.0) as far,
        open_channel(far.address) as channel,
    ):
        assert (await job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest(name="x"))).name == "x"


async def test_a_method_that_the_service_lacks_is_unimplemented() -> None:
    async with connected(lambda server: None) as channel:
        with pytest.raises(errors.UnimplementedError):
            await job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest())


async def test_a_call_without_a_deadline_is_given_one_by_the_server() -> None:
    settings = ServiceSettings(default_deadline=0.2)
    async with (
        serving(jobs(Jobs(lambda _: forever())), settings) as server,
        grpc.aio.insecure_channel(server.address) as plain,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await job_pb2_grpc.JobServiceStub(plain).GetJob(job_pb2.GetJobRequest())
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "default of 0.2 s" in str(caught.value.details())


async def test_a_call_without_a_deadline_is_given_one_by_the_channel() -> None:
    async with connected(jobs(Jobs(lambda _: forever())), deadlines={"GetJob": 0.2}) as channel:
        with pytest.raises(errors.DeadlineError):
            await job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest())


async def test_a_watch_has_no_default_deadline() -> None:
    async def later() -> None:
        await asyncio.sleep(0.5)

    settings = ServiceSettings(default_deadline=0.1)
    async with connected(jobs(Jobs(lambda _: later())), settings, default_deadline=0.1) as channel:
        events = [e async for e in job_pb2_grpc.JobServiceStub(channel).WatchJob(job_pb2.WatchJobRequest())]
    assert len(events) == 1


async def test_calls_over_the_limit_are_refused_with_a_time_to_retry() -> None:
    settings = ServiceSettings(max_concurrent_rpcs=1)
    async with connected(jobs(Jobs(lambda _: forever())), settings) as channel:
        stub = job_pb2_grpc.JobServiceStub(channel)
        first = asyncio.ensure_future(stub.WatchJob(job_pb2.WatchJobRequest()).read())
        await first
        with pytest.raises(errors.BusyError) as caught:
            await stub.GetJob(job_pb2.GetJobRequest())
    assert caught.value.retry_after > 0


async def test_streams_that_are_followed_leave_room_for_calls() -> None:
    async with connected(jobs(Jobs(lambda _: forever())), ServiceSettings(max_concurrent_rpcs=4)) as channel:
        stub = job_pb2_grpc.JobServiceStub(channel)
        followed = [stub.WatchJob(job_pb2.WatchJobRequest()) for _ in range(3)]
        for stream in followed:
            await stream.read()
        with pytest.raises(errors.BusyError, match=r"3 streams are being followed already .* max_concurrent_rpcs"):
            await stub.WatchJob(job_pb2.WatchJobRequest()).read()
        with pytest.raises(errors.DeadlineError):  # it is handled, and waits
            await stub.GetJob(job_pb2.GetJobRequest(), timeout=0.3)
        followed[0].cancel()
        while True:
            try:
                await stub.WatchJob(job_pb2.WatchJobRequest()).read()
                break
            except errors.BusyError:  # the server has not noticed yet
                await asyncio.sleep(0.01)


async def test_bytes_that_are_no_message_are_invalid() -> None:
    async with connected(jobs(Jobs(lambda _: job_pb2.Job()))) as channel:
        call = channel.unary_unary(f"/{JOBS}/GetJob", request_serializer=bytes, response_deserializer=bytes)
        with pytest.raises(errors.InvalidInputError) as caught:
            await call(b"\xff\xff\xff")
    assert caught.value.reason == "MALFORMED"


async def test_a_message_over_the_limit_is_refused_with_advice() -> None:
    settings = ServiceSettings(max_message_bytes=MIB)
    async with connected(jobs(Jobs(lambda _: job_pb2.Job())), settings) as channel:
        with pytest.raises(errors.InvalidInputError, match="max_message_bytes") as caught:
            await job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest(name="x" * (MIB + 1)))
    assert caught.value.reason == "MESSAGE_TOO_LARGE"


async def test_an_idempotent_call_is_repeated_while_the_service_is_unavailable() -> None:
    servicer = Jobs(lambda _: None)

    def act(_name: str) -> job_pb2.Job:
        if servicer.calls < 3:
            raise errors.UnavailableError("starting")
        return job_pb2.Job(name="jobs/x")

    servicer.act = act
    async with connected(jobs(servicer), idempotent=[f"{JOBS}/GetJob"]) as channel:
        job = await job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest())
    assert (job.name, servicer.calls) == ("jobs/x", 3)


async def test_other_calls_are_made_once() -> None:
    servicer = raising(errors.UnavailableError("starting"))
    async with connected(jobs(servicer)) as channel:
        with pytest.raises(errors.UnavailableError):
            await job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest())
    assert servicer.calls == 1


async def test_the_callers_log_context_arrives_with_the_call() -> None:
    seen: list[dict[str, object]] = []

    def act(_name: str) -> job_pb2.Job:
        seen.append(log.current_context())
        return job_pb2.Job()

    async with connected(jobs(Jobs(act))) as channel:
        with log.bound(job="j1", step=7, policy_version=6):
            await job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest())
    assert seen == [{"job": "j1", "step": 7, "policy_version": 6}]


async def test_a_second_server_on_a_taken_port_is_a_config_error() -> None:
    async with serving(lambda server: None) as first:
        with pytest.raises(errors.ConfigError, match="listen"):
            await RpcServer(ServiceSettings(listen=first.address)).start()


async def test_calls_go_round_all_the_servers_that_a_target_stands_for() -> None:
    one, other = (Jobs(lambda name: job_pb2.Job(name=name)) for _ in range(2))

    def register(jobs: Jobs) -> Callable[[RpcServer], None]:
        return lambda server: server.add(job_pb2_grpc.add_JobServiceServicer_to_server, jobs, JOBS)

    async with (
        serving(register(one)) as first,
        serving(register(other)) as second,
        open_channel(f"ipv4:{first.address},{second.address}", ClientSecurity()) as channel,
    ):
        stub = job_pb2_grpc.JobServiceStub(channel)
        while not (one.calls and other.calls):  # the second connection may take a moment longer
            await stub.GetJob(job_pb2.GetJobRequest(name="x"))
        one.calls = other.calls = 0
        for _ in range(10):
            await stub.GetJob(job_pb2.GetJobRequest(name="x"))
    assert (one.calls, other.calls) == (5, 5)
