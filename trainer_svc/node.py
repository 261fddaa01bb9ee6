"""`python -m trainer_svc.node`: the ranks of a further node. Node 0 is the trainer service itself.

Reads MASTER_ADDR, MASTER_PORT and NODE_RANK (1 or more) from the environment. The ranks wait for those of node 0, train
with them, and end with them; if one falls, all of this node do, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

from surogate.process import die_with_parent
from trainer_svc.rank_plan import RankPlan, count_gpus
from trainer_svc.supervisor import WORKER_COMMAND, RankProcess, start_rank


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


async def _run(plan: RankPlan, node: int) -> int:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    ranks = [await start_rank(WORKER_COMMAND, int(one["RANK"]), one, None) for one in plan.environments(node)]
    ends = [asyncio.create_task(_ended(rank)) for rank in ranks]
    stop = asyncio.create_task(stopped.wait())
    try:
        while not stop.done() and any(not end.done() for end in ends):
            await asyncio.wait({stop, *(end for end in ends if not end.done())}, return_when=asyncio.FIRST_COMPLETED)
            if any(end.done() and end.result() != 0 for end in ends):
                return 1
        return 1 if stop.done() else 0
    finally:
        await asyncio.gather(*(rank.kill() for rank in ranks))
        stop.cancel()


async def _ended(rank: RankProcess) -> int:
    await rank.exited()
    code = rank.code
    assert code is not None
    return code


if __name__ == "__main__":
    sys.exit(main())
