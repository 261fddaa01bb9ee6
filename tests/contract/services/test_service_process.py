"""The life of a service process: announced, drained, killed, orphaned, and refused for bad settings."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from surogate.errors import UnavailableError
from surogate.process import ServiceProcess, last_lines, start_service
from surogate.rpc import health
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.v1 import job_pb2, job_pb2_grpc
from tests.helpers.waiting import PATIENCE, until

TOY = "tests.helpers.toy_service"
JOBS = "surogate.v1.JobService"
REQUEST = job_pb2.GetJobRequest(name="jobs/x")


@asynccontextmanager
async def started(tmp_path: Path, *arguments: str, token: str | None = None) -> AsyncIterator[ServiceProcess]:
    service = await start_service(TOY, arguments, log_file=tmp_path / "toy.log", token=token)
    try:
        yield service
    finally:
        await service.stop(grace=PATIENCE)


async def test_a_started_service_announces_itself_and_answers(tmp_path: Path) -> None:
    async with started(tmp_path, token="secret") as service:
        async with open_channel(service.address, ClientSecurity(token="secret")) as channel:
            await health.wait_serving(channel, JOBS, timeout=PATIENCE)
            job = await job_pb2_grpc.JobServiceStub(channel).GetJob(REQUEST)
        assert job.name == f"jobs/{service.announcement.pid}"
        url = f"http://{service.announcement.metrics_address}/metrics"
        text = (await asyncio.to_thread(lambda: urllib.request.urlopen(url).read())).decode()
    assert f'surogate_rpc_server_seconds_count{{code="OK",method="GetJob",service="{JOBS}"}} 1.0' in text
    assert service.process.returncode == 0


async def test_sigterm_lets_calls_in_flight_finish_and_ends_watches(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    async with started(tmp_path, "--wait", "1", "--mark", str(mark)) as service:
        async with open_channel(service.address, ClientSecurity()) as channel:
            stub = job_pb2_grpc.JobServiceStub(channel)
            watch = stub.WatchJob(job_pb2.WatchJobRequest())
            assert (await watch.read()).sequence == 1
            call = asyncio.create_task(_get(stub))
            await said(service, "GetJob waits")
            service.process.send_signal(signal.SIGTERM)
            with pytest.raises(UnavailableError) as caught:
                await watch.read()
            assert caught.value.reason == "DRAINING"
            assert (await call).name.startswith("jobs/")
            with pytest.raises(UnavailableError):
                await stub.GetJob(REQUEST)
        assert await asyncio.wait_for(service.process.wait(), PATIENCE) == 0
    assert mark.read_text() == "clean"


async def said(service: ServiceProcess, text: str) -> None:
    """Waits until a line of the service's log has the text."""
    await until(lambda: text in service.log_file.read_text())


async def _get(stub: job_pb2_grpc.JobServiceAsyncStub) -> job_pb2.Job:
    return await stub.GetJob(REQUEST)


async def test_a_second_sigint_exits_at_once(tmp_path: Path) -> None:
    async with (
        started(tmp_path, "--wait", "60") as service,
        open_channel(service.address, ClientSecurity()) as channel,
    ):
        call = asyncio.create_task(_get(job_pb2_grpc.JobServiceStub(channel)))
        await said(service, "GetJob waits")
        service.process.send_signal(signal.SIGINT)
        await said(service, "draining")
        assert service.process.returncode is None, "it waits for the call"
        service.process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(service.process.wait(), PATIENCE) == 130
        with pytest.raises(UnavailableError):
            await call


async def test_a_failure_while_serving_ends_the_process_with_an_error(tmp_path: Path) -> None:
    async with started(tmp_path, "--fail", "later") as service:
        async with open_channel(service.address, ClientSecurity()) as channel:
            await job_pb2_grpc.JobServiceStub(channel).GetJob(REQUEST)
        assert await asyncio.wait_for(service.process.wait(), PATIENCE) == 1
    assert "the engine died" in last_lines(service.log_file)


async def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="the model cannot be loaded") as caught:
        await start_service(TOY, ["--fail", "start"], log_file=tmp_path / "toy.log")
    assert "Traceback" not in caught.value.message


async def test_a_service_dies_with_its_parent(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import asyncio, os, signal, sys
        from pathlib import Path
        from surogate.process import start_service

        async def main():
            service = await start_service("tests.helpers.toy_service", log_file=Path(sys.argv[1]))
            print(service.announcement.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(main())
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "toy.log")]
    parent = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    pid = int((await parent.communicate())[0])
    assert parent.returncode == -signal.SIGKILL
    await until(lambda: not _alive(pid))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SUROGATE_TOY_LOG_FORMAT": "text"}
    command = [sys.executable, "-m", TOY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "nowhere"], "listen: must be HOST:PORT"),
        (["--listen", "192.0.2.1:1"], "listen: cannot listen on 192.0.2.1:1"),
        (["--metrics-listen", "192.0.2.1:1"], "metrics_listen: cannot listen on 192.0.2.1:1"),
        (["--tls-cert", "/none.pem", "--tls-key", "/none.key"], "tls_cert: cannot use /none.pem"),
        (["--token-env", "NO_SUCH_VARIABLE"], "token_env: the environment variable NO_SUCH_VARIABLE"),
        (["--settings", "/none.yaml"], "settings: cannot read /none.yaml"),
        (["--wait", "long"], "wait: Input should be a valid number"),
        (["--announce-file", "/proc/none/announce"], "announce_file: cannot write"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_bad_settings_are_one_clear_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_shows_what_the_flags_are_for_and_imports_nothing_heavy() -> None:
    program = "import sys\ntry:\n    from tests.helpers.toy_service import ToySettings\n"
    program += "    from surogate.config.service import parse_settings\n    parse_settings(ToySettings, ['--help'])\n"
    program += "except SystemExit:\n    pass\nprint([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--max-message-bytes" in done.stdout
    assert "Seconds that GetJob takes" in done.stdout
    assert done.stdout.strip().endswith("[]")
