"""One rank of several whose optimisers step on shares of weights: `python -m tests.helpers.trainer.shares_program`.

Every rank also makes the same steps on whole weights by itself, and ends with an error unless both agree: steps, the
state that goes into a checkpoint, and steps that go on from one, in shares or whole. Variables as of torchrun.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from surogate.config.train import TrainConfig
from trainer_svc.worker.optim.optimizer import Optimizer
from trainer_svc.worker.optim.optimizer_kinds import SMALLEST_8BIT
from trainer_svc.worker.optim.schedule import Schedule
from trainer_svc.worker.ranks import Ranks
from trainer_svc.worker.shares import whole

SHAPES = {
    "even": (6, 1024), "uneven": (5, 1024), "fewer rows than ranks": (2, 4096), "cut inside blocks": (64, 100),
    "small": (6, 10), "vector": (9,), "experts": (4, 32, 64),
}  # fmt: skip
"""Weights for three ranks, by what is special."""

Weights = Mapping[str, Parameter]


def made(weights: Weights, optimizer: str, ranks: Ranks) -> Optimizer:
    """An optimiser for them. Gradients are not clipped: norms of shares are added up in another order."""
    train = TrainConfig.model_validate({
        "model": "m", "optimizer": optimizer, "learning_rate": 1e-2, "max_grad_norm": 0.0, "zero_level": 3
    })  # fmt: skip
    return Optimizer(weights, train, Schedule("constant", 10), ranks=ranks)


class Pair:
    """The same weights whole and in shares, which get the same gradients."""

    def __init__(self, optimizer: str, ranks: Ranks) -> None:
        self._mesh = init_device_mesh("cpu", (ranks.world_size,))
        self._optimizer = optimizer
        draw = torch.Generator().manual_seed(1)
        values = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        self.whole = {name: Parameter(value.clone()) for name, value in values.items()}
        self.shares = {name: Parameter(self._cut(value)) for name, value in values.items()}
        self.alone = made(self.whole, optimizer, Ranks())
        self.together = made(self.shares, optimizer, ranks)

    def _cut(self, value: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(value, self._mesh, [Shard(0)])

    def step(self, step: int) -> None:
        """One step of both, which must agree."""
        draw = torch.Generator().manual_seed(100 + step)
        for name, weight in self.whole.items():
            weight.grad = torch.randn(weight.shape, generator=draw)
            self.shares[name].grad = self._cut(weight.grad)
        self.alone.step(step)
        self.together.step(step)
        for name, weight in self.whole.items():
            self._agree(whole(self.shares[name].detach()), weight.detach(), name)

    def compare_states(self, ranks: Ranks) -> dict[str, torch.Tensor]:
        """The state in one piece."""
        alone, together = self.alone.state(), self.together.state()
        assert set(together) == (set(alone) if ranks.first else set())
        for name, value in together.items():
            self._agree(value, alone[name], name)
        return alone

    def go_back(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Both have these weights and this state again."""
        for optimizer in (self.alone, self.together):
            optimizer.restore(state)
        with torch.no_grad():
            for name, weight in weights.items():
                self.whole[name].copy_(weight)
                self.shares[name].copy_(self._cut(weight))

    def _agree(self, found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
        large = math.prod(SHAPES[name.partition("|")[0]]) >= SMALLEST_8BIT
        # torch's AdamW rounds the ends of tensors otherwise, and norms of NorMuon are sums over ranks.
        exact = self._optimizer == "adamw_8bit" and large
        bound = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found, expected, msg=lambda text: f"{self._optimizer} {name}: {text}", **bound)


def check(optimizer: str, ranks: Ranks) -> None:
    """Two steps, the state, back to it from a third, which is made again."""
    pair = Pair(optimizer, ranks)
    pair.step(0)
    pair.step(1)
    state = pair.compare_states(ranks)
    weights = {name: weight.detach().clone() for name, weight in pair.whole.items()}
    pair.step(2)
    pair.go_back(weights, state)
    pair.step(2)
    pair.compare_states(ranks)


def main() -> int:
    """All optimisers."""
    ranks = Ranks.join()
    for optimizer in ("adamw", "adamw_8bit", "normuon"):
        check(optimizer, ranks)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
