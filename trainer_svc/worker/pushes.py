"""In what form a policy is pushed to inference, and why."""

from __future__ import annotations

from dataclasses import dataclass

from surogate.config.train import TrainConfig
from surogate.v1 import weights_pb2
from trainer_svc.worker.adapters.lora_targets import not_served
from trainer_svc.worker.errors import config_error
from trainer_svc.worker.model.modeling import load_model_config, stored_in
from trainer_svc.worker.model.policy import Policy

FULL, LORA, DELTA = weights_pb2.WEIGHT_KIND_FULL, weights_pb2.WEIGHT_KIND_LORA, weights_pb2.WEIGHT_KIND_DELTA


@dataclass(frozen=True)
class Pushes:
    """`kind`: LORA, the adapter; DELTA, the weights that it is on with its product added; FULL, all weights."""

    kind: weights_pb2.WeightKind.ValueType = FULL
    remark: str = ""
    """For people: that weights are merged, and why; empty where they are not."""


def plan_pushes(policy: Policy, train: TrainConfig, *, merge: bool) -> Pushes:
    """Chooses; `merge`: replicas take no adapters. Raises ConfigError where what was chosen cannot be served."""
    adapter = policy.adapter
    if adapter is None:
        return Pushes()
    why = not_served(adapter) or ("infer.enable_lora is false" if merge else None)
    if why is None:
        return Pushes(LORA)
    packed = stored_in(load_model_config(train))
    if packed is not None:
        instead = "name a model in plain weights, or adapt layers that adapters are served on"
        raise config_error(
            "model", f"is stored in {packed}, and replicas that serve it so take no merged weights ({why}); {instead}"
        )
    return Pushes(DELTA, f"inference is given merged weights after each step instead of the adapter, as {why}")
