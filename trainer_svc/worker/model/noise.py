"""`noise_scheduler`: noise on the norms of the policy that samples, so that it explores (QeRL, arXiv:2510.11696).

It is on the weights that inference gets, never on those that are trained or saved. Rollouts come with the logprobs that
they were sampled with, so that the importance ratio of the loss knows of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from surogate.config.train import NoiseScheduler


def deviation(step: int, total: int, scheduler: NoiseScheduler) -> float:
    """Standard deviation of the noise after optimiser step `step` of `total`.

    The run is cut into `num_stages` equal stages. The first has no noise; from the second to the last it goes from
    `sigma_start` to `sigma_end`, by the same factor from each to the next.
    """
    stage = min(step * scheduler.num_stages // total, scheduler.num_stages - 1)
    if not scheduler.enabled or stage == 0:
        return 0.0
    done = (stage - 1) / max(scheduler.num_stages - 2, 1)
    return float(scheduler.sigma_start * (scheduler.sigma_end / scheduler.sigma_start) ** done)


def with_noise(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], sigma: float, *, seed: int, version: int
) -> dict[str, torch.Tensor]:
    """`state`, with noise on the norms before linear layers: the RMSNorms as wide as the model. Same seed and version,
    same noise.
    """
    if sigma == 0:
        return dict(state)
    width = model.config.get_text_config().hidden_size
    norms = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RMSNorm") and module.weight.shape == (width,)
    }
    generator = torch.Generator().manual_seed((seed << 31) + version)
    found = {}
    for name in sorted(state):
        value = state[name]
        if name in norms:
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.device)
            value = (value.float() + sigma * noise).to(value.dtype)
        found[name] = value
    return {name: found[name] for name in state}
