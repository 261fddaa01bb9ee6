"""What becomes of an inference replica's processes when one of them ends, and of two replicas when a push fails."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from surogate.errors import SurogateError, UnavailableError
from surogate.v1 import weights_pb2
from tests.helpers.inference import Replica, adapter_manifest, replica
from tests.helpers.models.tiny import make_tiny_adapter, make_tiny_model

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1200)]

PROMPT = list(range(10, 60))
LONG = {"max_tokens": 400, "min_tokens": 400}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    make_tiny_model(folder / "model", std=0.1)
    make_tiny_adapter(folder / "adapter", folder / "model")
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two(folder: Path) -> AsyncIterator[tuple[Replica, Replica]]:
    async with AsyncExitStack() as stack:
        starting = [replica(folder / name, folder / "model") for name in ("first", "second")]
        first, second = await asyncio.gather(*(stack.enter_async_context(each) for each in starting))
        yield first, second


async def test_two_replicas_serve_the_same_version_after_a_push_that_reached_only_one(
    two: tuple[Replica, Replica], folder: Path
) -> None:
    manifest, image = adapter_manifest(folder / "adapter", 1)
    await two[0].stage("cut", manifest, image)
    await two[1].weights.CreateWeightUpdate(weights_pb2.CreateWeightUpdateRequest(update_id="cut", manifest=manifest))
    for each in two:
        await each.weights.AbortWeightUpdate(weights_pb2.AbortWeightUpdateRequest(update_id="cut"))
    assert [(await each.served()).policy_version for each in two] == [0, 0]

    for each in two:
        await each.push(manifest, image)
    answers = [await each.generate(PROMPT, 2, max_tokens=8, seed=3, min_policy_version=1) for each in two]
    for one, other in zip(*(answer.completions for answer in answers), strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert [span.policy_version for span in answers[0].completions[0].policy_spans] == [1]


async def test_the_queue_of_vllm_is_among_the_metrics(two: tuple[Replica, Replica]) -> None:
    await two[0].generate(PROMPT, 2, max_tokens=8)
    url = f"http://{two[0].process.announcement.metrics_address}/metrics"
    text = (await asyncio.to_thread(lambda: urllib.request.urlopen(url).read())).decode()
    for name in ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        assert re.search(rf"^{name}\{{.*\}} 0\.0", text, re.M), name
    assert float(re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)", text, re.M)[0]) >= 16


async def test_sigterm_lets_requests_finish_and_kill_takes_the_engine_along(two: tuple[Replica, Replica]) -> None:
    drained, killed = two
    engines = [_children(each) for each in two]
    request = asyncio.ensure_future(drained.generate(PROMPT, 2, **LONG))
    await asyncio.sleep(0)  # sends it
    await drained.until_tokens_flow(PROMPT)

    drained.process.process.send_signal(signal.SIGTERM)
    killed.process.process.send_signal(signal.SIGKILL)

    assert len((await request).completions[0].token_ids) == LONG["max_tokens"]
    assert await drained.process.process.wait() == 0
    assert "Traceback" not in drained.process.log_file.read_text(), "an end in good order is no failure"
    assert await killed.process.process.wait() == -signal.SIGKILL
    await _until_gone([*engines[0], *engines[1]])


async def test_a_replica_whose_engine_dies_says_so_and_exits(folder: Path) -> None:
    async with replica(folder / "third", folder / "model") as started:
        request = asyncio.ensure_future(started.generate(PROMPT, 16, **LONG))
        await asyncio.sleep(0)  # sends it
        await started.until_tokens_flow(PROMPT)
        for child in _children(started):
            os.kill(child, signal.SIGKILL)

        with pytest.raises(UnavailableError):
            await request
        assert await started.process.process.wait() == 1
        with pytest.raises(SurogateError):
            await started.served()


def _children(started: Replica) -> list[int]:
    """Process ids of the engine and of whatever else the replica started."""
    pid = started.process.process.pid
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in found for child in file.read_text().split()]


async def _until_gone(pids: list[int]) -> None:
    """Returns when none of the processes runs any more; pytest's timeout is the limit."""
    while any(_runs(pid) for pid in pids):  # noqa: ASYNC110 - they are no children of this process
        await asyncio.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
