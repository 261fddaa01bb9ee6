"""How many processes train a session, and the variables by which they find each other. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surogate.config.train import TrainConfig
from surogate.errors import ConfigError, Violation
from surogate.ports import free_port


@dataclass(frozen=True)
class RankPlan:
    """`local` processes on each of `nodes` nodes. `address`: of node 0, None when it is the only one."""

    local: int = 1
    nodes: int = 1
    address: tuple[str, int] | None = None

    def environments(self, node: int = 0) -> list[dict[str, str]]:
        """Variables, as torchrun sets them, of the processes of a node. Cores are divided among them."""
        host, port = self.address or ("127.0.0.1", free_port())
        shared = {
            "WORLD_SIZE": str(self.local * self.nodes),
            "LOCAL_WORLD_SIZE": str(self.local),
            "GROUP_RANK": str(node),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "PYTHONUNBUFFERED": "1",
        }
        if self.local > 1 and "OMP_NUM_THREADS" not in os.environ:
            shared["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // self.local))
        return [
            {**shared, "RANK": str(node * self.local + rank), "LOCAL_RANK": str(rank)} for rank in range(self.local)
        ]


def plan_ranks(train: TrainConfig, environment: Mapping[str, str] = os.environ) -> RankPlan:
    """The processes that `gpus` and `distributed` ask for: one a GPU, or on the CPU where there is none to use.

    Raises ConfigError, naming the key, for more GPUs than there are, and for several nodes without a meeting point.
    """
    there = 0 if train.cpu_training else count_gpus(environment)
    nodes, key = train.distributed.num_nodes, "train.gpus"
    wanted = train.gpus or max(there, 1)
    if train.distributed.gpus_per_node:
        wanted, key = train.distributed.gpus_per_node, "train.distributed.gpus_per_node"
    if there and wanted > there:
        raise ConfigError.of([Violation(key, f"is {wanted}, and this machine has {there} GPUs; lower it")])
    if nodes == 1:
        return RankPlan(wanted)
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        said = "needs MASTER_ADDR and MASTER_PORT in the trainer's environment: where the nodes meet"
        raise ConfigError.of([Violation("train.distributed.num_nodes", said)])
    return RankPlan(wanted, nodes, (host, int(port)))


def is_further_node(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is to be a further node of a trainer that has several."""
    rank, nodes = environment.get("NODE_RANK", ""), environment.get("NUM_NODES", "")
    return rank.isdigit() and nodes.isdigit() and 0 < int(rank) < int(nodes)


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """NVIDIA GPUs that a process here may use."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([device for device in named.split(",") if device.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])
