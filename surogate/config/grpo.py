"""The configuration of a GRPO job in one place: losses, and the models of the three files."""

from __future__ import annotations

from surogate.config.env import EnvConfig, EvalConfig
from surogate.config.infer import InferConfig
from surogate.config.loss import CLIP_TYPES, AipoLoss, ClipLoss, DppoLoss, IpoLoss, LossConfig
from surogate.config.orch import CheckpointConfig, ClientConfig, OrchConfig, PolicyConfig
from surogate.config.sampling import SamplingConfig, TemperatureSchedule
from surogate.config.shaping import AdvantageConfig
from surogate.config.train import TrainConfig

__all__ = [
    "CLIP_TYPES",
    "AdvantageConfig",
    "AipoLoss",
    "CheckpointConfig",
    "ClientConfig",
    "ClipLoss",
    "DppoLoss",
    "EnvConfig",
    "EvalConfig",
    "InferConfig",
    "IpoLoss",
    "LossConfig",
    "OrchConfig",
    "PolicyConfig",
    "SamplingConfig",
    "TemperatureSchedule",
    "TrainConfig",
]
