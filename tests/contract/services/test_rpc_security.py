"""Who gets in: bearer tokens, their rotation, TLS and mTLS."""

from __future__ import annotations

import asyncio
import io
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from surogate.config.service import MIB, ServiceSettings
from surogate.errors import ConfigError, InvalidInputError, UnauthenticatedError, UnavailableError, UnimplementedError
from surogate.rpc import health
from surogate.rpc.auth import TokenSource
from surogate.rpc.caller import caller
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.rpc.server import RpcServer
from surogate.telemetry import log
from surogate.v1 import job_pb2, job_pb2_grpc, reward_pb2, reward_pb2_grpc
from tests.helpers.certificates import Authority
from tests.helpers.rpc import connected, serving


class Jobs(job_pb2_grpc.JobServiceServicer):
    async def GetJob(self, request: job_pb2.GetJobRequest, context: object) -> job_pb2.Job:
        return job_pb2.Job(name="jobs/x")


def register(server: RpcServer) -> None:
    server.add(job_pb2_grpc.add_JobServiceServicer_to_server, Jobs(), "surogate.v1.JobService")


async def get(channel: grpc.aio.Channel) -> str:
    job = await job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest())
    return str(job.name)


async def test_any_of_the_tokens_in_the_environment_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_TOKENS", "new, old")
    async with serving(register, ServiceSettings(token_env="THE_TOKENS")) as server:
        for token in ("new", "old"):
            async with open_channel(server.address, ClientSecurity(token=token)) as channel:
                assert await get(channel) == "jobs/x"
        for security, reason in ((ClientSecurity(token="wrong"), "TOKEN_INVALID"), (ClientSecurity(), "TOKEN_MISSING")):
            async with open_channel(server.address, security) as channel:
                with pytest.raises(UnauthenticatedError) as caught:
                    await get(channel)
                assert caught.value.reason == reason


async def test_tokens_are_rotated_by_writing_the_file(tmp_path: Path) -> None:
    tokens, mine = tmp_path / "tokens", tmp_path / "mine"
    tokens.write_text("first\n")
    mine.write_text("first\n")
    settings, security = ServiceSettings(token_file=tokens), ClientSecurity(token_file=mine)
    async with connected(register, settings, security) as channel:
        assert await get(channel) == "jobs/x"
        tokens.write_text("second\nfirst\n")
        assert await get(channel) == "jobs/x"
        tokens.write_text("second\n")
        with pytest.raises(UnauthenticatedError):
            await get(channel)
        mine.write_text("second\n")
        assert await get(channel) == "jobs/x"
        tokens.unlink()
        assert await get(channel) == "jobs/x", "a file that is gone for a moment locks nobody out"


async def test_probes_need_no_token_and_reflection_does(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")

    async def reflect(channel: grpc.aio.Channel) -> list[str]:
        async def ask() -> object:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask())
        return [s.name async for answer in call for s in answer.list_services_response.service]

    async with serving(register, ServiceSettings(token_file=tokens)) as server:
        async with open_channel(server.address, ClientSecurity()) as channel:
            check = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert check.status == health_pb2.HealthCheckResponse.SERVING
            assert await health.is_serving(channel, "surogate.v1.JobService")
            with pytest.raises(UnauthenticatedError):
                await reflect(channel)
        async with open_channel(server.address, ClientSecurity(token="secret")) as channel:
            assert "surogate.v1.JobService" in await reflect(channel)


async def test_probes_that_know_no_tls_have_a_port_with_health_alone(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    settings = ServiceSettings(
        tls_cert=pair.cert, tls_key=pair.key, tls_client_ca=authority.cert, health_listen="127.0.0.1:0"
    )
    async with serving(register, settings) as server:
        async with open_channel(server.health_address, ClientSecurity()) as channel:
            assert await health.is_serving(channel, "surogate.v1.JobService")
            assert not await health.is_serving(channel, "surogate.v1.NoSuchService")
            with pytest.raises(UnimplementedError):
                await get(channel)
        with pytest.raises(ConfigError, match="health_listen"):
            await RpcServer(settings.model_copy(update={"health_listen": server.health_address})).start()


async def test_a_service_that_is_not_ready_or_drains_is_alive_all_the_same() -> None:
    async with serving(register) as server, open_channel(server.address, ClientSecurity()) as channel:
        server.set_serving("surogate.v1.JobService", False)
        assert not await health.is_serving(channel, "surogate.v1.JobService")
        assert not await health.is_serving(channel)
        assert await health.is_serving(channel, health.SERVICE)


async def test_a_token_never_gets_into_the_logs(tmp_path: Path) -> None:
    out = io.StringIO()
    log.configure("json", "debug", stream=out)
    tokens = tmp_path / "tokens"
    tokens.write_text("s3cret-one\n")
    try:
        async with connected(
            register, ServiceSettings(token_file=tokens), ClientSecurity(token="s3cret-two")
        ) as channel:
            with pytest.raises(UnauthenticatedError):
                await get(channel)
        log.get_logger("test").info("said", token="s3cret-three", authorization="Bearer s3cret-four")
    finally:
        log.configure("json", "warning")
    assert "s3cret" not in out.getvalue()
    assert "s3cret" not in repr(ClientSecurity(token="s3cret"))


async def test_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    settings = ServiceSettings(tls_cert=pair.cert, tls_key=pair.key)
    async with serving(register, settings) as server:
        async with open_channel(server.address, ClientSecurity(ca_file=authority.cert)) as channel:
            assert await get(channel) == "jobs/x"
        for stranger in (ClientSecurity(), ClientSecurity(ca_file=Authority(tmp_path, "other").cert)):
            async with open_channel(server.address, stranger) as channel:
                with pytest.raises(UnavailableError):
                    await get(channel)


async def test_mtls_lets_in_only_clients_of_the_authority(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    pair, client, stranger = authority.issue("server"), authority.issue("client"), other.issue("stranger")
    settings = ServiceSettings(tls_cert=pair.cert, tls_key=pair.key, tls_client_ca=authority.cert)

    def security(cert: Path | None, key: Path | None) -> ClientSecurity:
        return ClientSecurity(ca_file=authority.cert, cert_file=cert, key_file=key)

    async with serving(register, settings) as server:
        async with open_channel(server.address, security(client.cert, client.key)) as channel:
            assert await get(channel) == "jobs/x"
        for refused in (security(None, None), security(stranger.cert, stranger.key)):
            async with open_channel(server.address, refused) as channel:
                with pytest.raises(UnavailableError):
                    await get(channel)


async def test_a_renewed_certificate_is_taken_up(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    pair = old.issue("server")
    async with serving(register, ServiceSettings(tls_cert=pair.cert, tls_key=pair.key)) as server:
        async with open_channel(server.address, ClientSecurity(ca_file=old.cert)) as channel:
            assert await get(channel) == "jobs/x"
        new.issue("server")  # writes the same files
        async with open_channel(server.address, ClientSecurity(ca_file=new.cert)) as channel:
            assert await get(channel) == "jobs/x"


async def test_both_ends_renew_short_lived_certificates_without_a_restart(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server_pair = authority.issue("server", seconds=6.0)
    client_pair = authority.issue("client", seconds=6.0)
    settings = ServiceSettings(
        tls_cert=server_pair.cert,
        tls_key=server_pair.key,
        tls_client_ca=authority.cert,
        max_connection_age=0.5,  # connections are made anew, as they are when pods move
    )
    security = ClientSecurity(ca_file=authority.cert, cert_file=client_pair.cert, key_file=client_pair.key)
    async with serving(register, settings) as server, open_channel(server.address, security) as channel:
        stub = job_pb2_grpc.JobServiceStub(channel)

        async def called() -> bool:
            try:
                return (await stub.GetJob(job_pb2.GetJobRequest(), timeout=60)).name == "jobs/x"
            except UnavailableError:
                return False

        assert await called()
        await asyncio.sleep(8.0)  # until they have expired, and connections from before with them
        key = client_pair.key.read_bytes()
        authority.issue("server")
        authority.issue("client")
        renewed = client_pair.key.read_bytes()
        client_pair.key.write_bytes(key)
        assert not await called(), "a key without its certificate is not used"
        client_pair.key.write_bytes(renewed)
        while not await called():  # noqa: ASYNC110 - gRPC tries again after a pause
            await asyncio.sleep(0.2)


async def test_calls_in_flight_outlive_a_renewal(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server_pair, client_pair = authority.issue("server"), authority.issue("client")
    settings = ServiceSettings(tls_cert=server_pair.cert, tls_key=server_pair.key, tls_client_ca=authority.cert)
    security = ClientSecurity(ca_file=authority.cert, cert_file=client_pair.cert, key_file=client_pair.key)
    answer = asyncio.Event()

    class Slow(Jobs):
        async def GetJob(self, request: job_pb2.GetJobRequest, context: object) -> job_pb2.Job:
            if request.name == "slow":
                await answer.wait()
            return job_pb2.Job(name="jobs/x")

    def slowly(server: RpcServer) -> None:
        server.add(job_pb2_grpc.add_JobServiceServicer_to_server, Slow(), "surogate.v1.JobService")

    async with serving(slowly, settings) as server, open_channel(server.address, security) as channel:
        stub = job_pb2_grpc.JobServiceStub(channel)
        slow = asyncio.ensure_future(stub.GetJob(job_pb2.GetJobRequest(name="slow"), timeout=30))
        await asyncio.sleep(0.3)
        authority.issue("client")
        assert await get(channel) == "jobs/x"
        answer.set()
        assert (await slow).name == "jobs/x"


async def test_a_compressed_bomb_is_refused_unread() -> None:
    settings = ServiceSettings(max_message_bytes=MIB)
    options = [("grpc.max_send_message_length", -1)]
    async with (
        serving(register, settings) as server,
        grpc.aio.insecure_channel(server.address, compression=grpc.Compression.Gzip, options=options) as channel,
    ):
        bomb = job_pb2.GetJobRequest(name="a" * (64 * MIB))  # some 64 KiB on the wire
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await job_pb2_grpc.JobServiceStub(channel).GetJob(bomb, timeout=30)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_files_that_are_no_certificates_are_config_errors(tmp_path: Path) -> None:
    pair, other = Authority(tmp_path).issue("server"), Authority(tmp_path, "b").issue("other")
    junk = tmp_path / "junk"
    junk.write_text("junk")
    for settings, field in (
        (ServiceSettings(tls_cert=junk, tls_key=pair.key), "tls_cert"),
        (ServiceSettings(tls_cert=pair.cert, tls_key=other.key), "tls_cert"),
        (ServiceSettings(tls_cert=pair.cert, tls_key=pair.key, tls_client_ca=tmp_path / "none"), "tls_client_ca"),
    ):
        with pytest.raises(ConfigError) as caught:
            await RpcServer(settings).start()
        assert [violation.field for violation in caught.value.violations] == [field]
    with pytest.raises(ConfigError, match="SUROGATE_TLS_CA"):
        open_channel("127.0.0.1:1", ClientSecurity(ca_file=tmp_path / "none"))


def test_what_holds_no_token_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    monkeypatch.setenv("EMPTY", " , ")
    from surogate.rpc.auth import TokenSource

    for arguments in ({"file": empty}, {"file": tmp_path / "none"}, {"env": "EMPTY"}, {"env": "NO_SUCH"}):
        with pytest.raises(ConfigError, match="token"):
            TokenSource(**arguments)  # type: ignore[arg-type]


def test_security_from_the_environment() -> None:
    security = ClientSecurity.from_env({"SUROGATE_TOKEN": "new,old", "SUROGATE_TLS_CA": "/ca.pem"})
    assert (security.token, security.ca_file, security.uses_tls) == ("new", Path("/ca.pem"), True)
    assert ClientSecurity.from_env({}) == ClientSecurity()


@pytest.mark.parametrize(("service", "code"), [("surogate.v1.JobService", 0), ("surogate.v1.Other", 1), ("", 0)])
async def test_the_probe_for_containers_ends_with_what_it_found(service: str, code: int) -> None:
    async with serving(register) as server:
        command = [sys.executable, "-m", "surogate.probe", server.address, *([service] if service else [])]
        process = await asyncio.create_subprocess_exec(*command)
        assert await process.wait() == code


@pytest.mark.parametrize("target", ["", "host", ":1", "host:0", "host:99999", "http://host:1", "host:1/x", "ho/st:1"])
async def test_a_target_that_is_no_address_is_refused(target: str) -> None:
    with pytest.raises(InvalidInputError, match="is not HOST:PORT"):
        open_channel(target, ClientSecurity())


@pytest.mark.parametrize("target", ["host:1", "[::1]:1", "dns:///host:1", "ipv4:10.0.0.1:1,10.0.0.2:1", "unix:/a/b"])
async def test_targets_of_grpc_are_taken(target: str) -> None:
    async with open_channel(target, ClientSecurity()):
        pass


@pytest.mark.parametrize("token", ["a\nb", "ä", "a b", "\x01"])
async def test_a_token_that_no_header_carries_is_refused(token: str) -> None:
    async with open_channel("127.0.0.1:1", ClientSecurity(token=token)) as channel:
        with pytest.raises(ConfigError, match="SUROGATE_TOKEN"):
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"SUROGATE_TLS_CA: .* is not PEM"):
        ClientSecurity(ca_file=file).credentials()
    with pytest.raises(ConfigError, match=r"token_file: .* is not text"):
        ClientSecurity(token_file=file).token_source()


async def test_a_token_with_a_name_says_who_calls(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("alice first\nnameless\nbob second\n")
    names: list[str] = []

    class Noting(reward_pb2_grpc.RewardServiceServicer):
        async def ListEnvironments(self, request: object, context: object) -> reward_pb2.ListEnvironmentsResponse:
            names.append(caller())
            return reward_pb2.ListEnvironmentsResponse()

    def add(server: RpcServer) -> None:
        server.add(reward_pb2_grpc.add_RewardServiceServicer_to_server, Noting(), "surogate.v1.RewardService")

    async with serving(add, ServiceSettings(token_file=tokens)) as server:
        for token in ("second", "nameless", "first"):
            async with open_channel(server.address, ClientSecurity(token=token)) as channel:
                await reward_pb2_grpc.RewardServiceStub(channel).ListEnvironments(reward_pb2.ListEnvironmentsRequest())
        async with open_channel(server.address, ClientSecurity(token="alice")) as channel:
            with pytest.raises(UnauthenticatedError):
                await reward_pb2_grpc.RewardServiceStub(channel).ListEnvironments(reward_pb2.ListEnvironmentsRequest())
    assert names == ["bob", "", "alice"]


def test_a_line_that_is_no_name_and_token_is_told_by_its_number(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("one\n\nalice her token\n")
    with pytest.raises(ConfigError, match="line 3: write a token, or a name and its token") as refused:
        TokenSource(tokens)
    assert "her" not in str(refused.value)
