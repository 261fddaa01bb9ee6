"""Seconds until a new replica has traffic: of inference, from the request to scale, and of a service behind a DNS name.

Inference replicas are processes that the local launcher starts, with vLLM on a tiny model; the orchestrator calls each
at its own address, as it does pods. The other rows are a client that goes round the addresses of a name, and servers
that ask clients to connect anew after so many seconds, as `k8s/base` has them do; the second joins the name at once.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from surogate.client.aio import AsyncClient
from surogate.config.service import ServiceSettings
from surogate.process import start_service
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.rpc.server import RpcServer
from surogate.v1 import job_pb2, reward_pb2, reward_pb2_grpc
from tests.bench.names import Names
from tests.bench.table import Cell, Options, Table
from tests.helpers.grpo.grpo_files import write_grpo_files
from tests.helpers.models.tiny import make_tiny_model

AIM = 45.0
AGES = (20.0, None)
"""Seconds of `max_connection_age`: of `k8s/base`, and without."""
CLIENTS = 8
"""They begin at different times within a connection's age."""
GIVE_UP = 90.0
CALL_PAUSE = 0.05
PARTS = ("train", "infer", "orch")


async def run(options: Options) -> Table:
    """The median and the longest of each."""
    rows: list[list[Cell]] = []
    for age in (0.5,) if options.quick else AGES:
        seconds = await _behind_a_name(age, 2 if options.quick else CLIENTS)
        what = f"service behind a name, max_connection_age {age:g}" if age else "the same without max_connection_age"
        rows.append(_row(what, None, seconds))
    if not options.quick:
        ready, traffic = zip(*[await _inference() for _ in range(options.rounds or 3)], strict=True)
        rows.append(_row("inference, from the request to scale", statistics.median(ready), list(traffic)))
    return Table(("what", "loaded after", "traffic after", "longest", "aim"), rows)


def _row(what: str, loaded: float | None, seconds: list[float | None]) -> list[Cell]:
    reached = [one for one in seconds if one is not None]
    if len(reached) < len(seconds):
        return [what, loaded, f"none in {GIVE_UP:g} s", f"{len(seconds) - len(reached)} of {len(seconds)}", AIM]
    return [what, loaded, statistics.median(reached), max(reached), AIM]


class _Counted(reward_pb2_grpc.RewardServiceServicer):
    def __init__(self) -> None:
        self.callers: dict[str, float] = {}

    async def ListEnvironments(self, request: Any, context: Any) -> reward_pb2.ListEnvironmentsResponse:
        """Notes when each caller came first."""
        caller = dict(context.invocation_metadata())["caller"]
        self.callers.setdefault(caller, time.monotonic())
        return reward_pb2.ListEnvironmentsResponse()


@asynccontextmanager
async def _server(address: str, port: int, age: float | None) -> AsyncIterator[tuple[_Counted, int]]:
    server = RpcServer(ServiceSettings(listen=f"{address}:{port}", max_connection_age=age))
    counted = _Counted()
    server.add(reward_pb2_grpc.add_RewardServiceServicer_to_server, counted, "surogate.v1.RewardService")
    await server.start()
    try:
        yield counted, int(server.address.rpartition(":")[2])
    finally:
        await server.stop()


async def _behind_a_name(age: float | None, clients: int) -> list[float | None]:
    """For each client the seconds from the change of the name to its first call at the new server."""
    async with AsyncExitStack() as stack:
        _, port = await stack.enter_async_context(_server("127.0.0.2", 0, age))
        new, _ = await stack.enter_async_context(_server("127.0.0.3", port, age))
        names = await Names.serving(["127.0.0.2"])
        stack.callback(names.close)
        calling = [
            asyncio.create_task(_call(f"{i}", names.port, port, i * (age or 20.0) / clients)) for i in range(clients)
        ]
        await asyncio.sleep(1.5 * (age or 20.0))  # all of them call by now
        names.addresses.append("127.0.0.3")
        changed = time.monotonic()
        while len(new.callers) < clients and time.monotonic() - changed < GIVE_UP:  # noqa: ASYNC110 - a measurement
            await asyncio.sleep(CALL_PAUSE)
        for task in calling:
            task.cancel()
        await asyncio.gather(*calling, return_exceptions=True)
        first = [new.callers.get(f"{i}") for i in range(clients)]
        return [None if one is None else one - changed for one in first]


async def _call(name: str, names_port: int, port: int, after: float) -> None:
    await asyncio.sleep(after)
    async with open_channel(f"dns://127.0.0.1:{names_port}/reward.test:{port}", ClientSecurity()) as channel:
        stub: Any = reward_pb2_grpc.RewardServiceStub(channel)
        while True:
            await stub.ListEnvironments(reward_pb2.ListEnvironmentsRequest(), metadata=[("caller", name)])
            await asyncio.sleep(CALL_PAUSE)


async def _inference() -> tuple[float, float]:
    """Seconds from ScaleJob to the new replica's loaded model, and to the end of its first rollouts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_model(folder / "model")
        steps = {"max_steps": 100_000, "save_steps": 100_000}
        write_grpo_files(folder, train={**steps, "model": str(folder / "model")}, orch={"max_async_level": 1})
        config = {"kind": "grpo", **{part: json.loads((folder / f"{part}.yaml").read_text()) for part in PARTS}}
        flags = ["--store-url", f"sqlite:///{folder}/jobs.db", "--output-root", str(folder)]
        orchestrator = await start_service("orchestrator_svc", flags, log_file=folder / "orchestrator.log")
        try:
            async with AsyncClient(orchestrator.address) as client:
                job = await client.create_job(config)
                async for event in client.watch(job):
                    if event.step_completed.step >= 3:
                        break
                await client.scale_job(job, inference=2)
                asked = time.monotonic()
                log = Path((await client.get_job(job)).output_dir) / "logs" / "inference-1.log"
                loaded = await _until(log, "surogate_weights_update_seconds_count", 'phase="commit"')
                served = await _until(log, "surogate_inference_requests_total", 'kind="rollouts",result="ok"')
                await client.cancel_job(job)
                async for _ in client.watch(job):
                    pass
                assert (await client.get_job(job)).state == job_pb2.Job.STATE_CANCELLED
        finally:
            await orchestrator.stop(grace=60.0)
        return loaded - asked, served - asked


async def _until(log: Path, metric: str, labels: str) -> float:
    """When a metric of the service that writes the log was more than 0 at last."""
    start = time.monotonic()
    while time.monotonic() - start < 10 * GIVE_UP:
        shown = await asyncio.to_thread(_metrics, log)
        values = [line.rpartition(" ")[2] for line in shown if line.startswith(metric) and labels in line]
        if any(float(value) for value in values):
            return time.monotonic()
        await asyncio.sleep(CALL_PAUSE)
    raise TimeoutError(f"{metric} stayed 0; {log} may say why")


def _metrics(log: Path) -> list[str]:
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
        address = next(line["metrics_address"] for line in lines if "metrics_address" in line)
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            text: str = answer.read().decode()
        return text.splitlines()
    except (OSError, ValueError, StopIteration):
        return []
