"""The ranks of a further node. Node 0 is the trainer service itself.

`python -m trainer_svc.node` reads MASTER_ADDR, MASTER_PORT and NODE_RANK (1 or more) from the environment. The ranks
wait for those of node 0, train with them, and end with them; if one falls, all of this node do, and the exit code is 1.

In a cluster every node runs the same command, the trainer's: with a NODE_RANK of 1 or more and NUM_NODES it is `serve`,
which answers health checks and offers ranks again and again, to whatever session node 0 has next.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from surogate import service
from surogate.process import die_with_parent
from surogate.rpc.server import RpcServer
from surogate.telemetry.log import get_logger
from trainer_svc.rank_plan import RankPlan, count_gpus
from trainer_svc.settings import TrainerSettings
from trainer_svc.supervisor import WORKER_COMMAND, RankProcess, start_rank

_SERVICE = "surogate.v1.TrainerService"
_PAUSE = 1.0
_log = get_logger("trainer")


def main() -> int:
    """Runs the node's ranks to their end; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer_svc.node", description=__doc__)
    parser.add_argument("--num-nodes", type=int, required=True, help="nodes in all: distributed.num_nodes")
    parser.add_argument(
        "--gpus-per-node", type=int, default=0, help="processes on this node, as on node 0; 0 (default) = one a GPU"
    )
    arguments = parser.parse_args()
    die_with_parent()
    host, port, node = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"))
    if not host or not port.isdigit() or not node.isdigit() or not 1 <= int(node) < arguments.num_nodes:
        parser.error("MASTER_ADDR, MASTER_PORT and NODE_RANK (1 to --num-nodes less 1) must be in the environment")
    plan = RankPlan(arguments.gpus_per_node or max(count_gpus(), 1), arguments.num_nodes, (host, int(port)))
    return asyncio.run(_run(plan, int(node)))


def serve(argv: Sequence[str] | None = None) -> int:
    """Offers ranks until SIGTERM; returns the exit code."""
    return service.main(TrainerSettings, lifespan, argv, prog="surogate-trainer")


@asynccontextmanager
async def lifespan(server: RpcServer, settings: TrainerSettings) -> AsyncIterator[None]:
    """The trainer's service in name, so that the same probes fit, and ranks beside it."""
    server.add(_add_nothing, None, _SERVICE)
    work = asyncio.create_task(_offer_ranks(dict(os.environ)), name="ranks")
    work.add_done_callback(partial(_stopped, server=server))
    try:
        yield
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def _add_nothing(servicer: None, server: Any) -> None:
    """Sessions are at node 0: this one has a name for health checks, and no methods."""


def _stopped(work: asyncio.Task[None], server: RpcServer) -> None:
    if not work.cancelled() and isinstance(error := work.exception(), Exception):
        server.fail(error)


async def _offer_ranks(environment: Mapping[str, str]) -> None:
    host, port, node = environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), int(environment["NODE_RANK"])
    local = int(environment.get("GPUS_PER_NODE") or 0) or max(count_gpus(), 1)
    plan = RankPlan(local, int(environment["NUM_NODES"]), (host, port))
    while True:
        code = await _ranks(plan, node)
        _log.info("the ranks of this node ended; offering new ones", code=code)
        await asyncio.sleep(_PAUSE)


async def _ranks(plan: RankPlan, node: int) -> int:
    """The ranks of one session, to their end; the first that falls takes the others with it."""
    ranks = [await start_rank(WORKER_COMMAND, int(one["RANK"]), one, None) for one in plan.environments(node)]
    ends = {asyncio.create_task(_ended(rank)) for rank in ranks}
    try:
        while ends:
            done, ends = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if any(end.result() != 0 for end in done):
                return 1
        return 0
    finally:
        await asyncio.gather(*(rank.kill() for rank in ranks))
        for end in ends:
            end.cancel()


async def _run(plan: RankPlan, node: int) -> int:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    work = asyncio.create_task(_ranks(plan, node))
    stop = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({stop, work}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else 1
    finally:
        stop.cancel()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def _ended(rank: RankProcess) -> int:
    await rank.exited()
    code = rank.code
    assert code is not None
    return code


if __name__ == "__main__":
    sys.exit(main())
