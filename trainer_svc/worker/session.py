"""What a session holds in memory: configuration, policy, optimiser, and how many steps were done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surogate.config.grpo import ClipLoss
from surogate.config.lora import BASE_FOLDER
from surogate.config.train import TrainConfig
from surogate.urls import is_url
from trainer_svc.worker.adapters import lora
from trainer_svc.worker.adapters.lora_targets import adapts_experts, check_shared
from trainer_svc.worker.data.tokenizer import load_tokenizer
from trainer_svc.worker.device.memory import keep_freed
from trainer_svc.worker.device.usage import DeviceUse
from trainer_svc.worker.errors import config_error
from trainer_svc.worker.folders.base import save_base
from trainer_svc.worker.folders.remote import RemoteCheckpoints
from trainer_svc.worker.model.cuda import compile_layers
from trainer_svc.worker.model.modeling import load_model, quantization_of
from trainer_svc.worker.model.policy import Policy
from trainer_svc.worker.model.recipe import check, use_recipe
from trainer_svc.worker.model.recompute import use_recompute
from trainer_svc.worker.optim.optimizer import Optimizer
from trainer_svc.worker.optim.schedule import Schedule
from trainer_svc.worker.optim.watch import EarlyStop, SpikeGuard
from trainer_svc.worker.pushes import Pushes
from trainer_svc.worker.quantized.linear import QuantizedLinear
from trainer_svc.worker.quantized.loading import quantize_layers
from trainer_svc.worker.ranks import Ranks

Kind = Literal["pt", "sft", "grpo"]


@dataclass
class TrainingSession:
    """The state of a session.

    `step`: optimiser steps done; `bad_steps`: how many of the last ones were skipped; `keep_interval`: checkpoints of
    its multiples stay for good (0: none); `spikes` and `end` watch the run where the configuration asks for it.
    """

    kind: Kind
    train: TrainConfig
    output_dir: Path
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    reference: Policy | None
    ranks: Ranks = field(default_factory=Ranks)
    step: int = 0
    bad_steps: int = 0
    keep_interval: int = 0
    spikes: SpikeGuard | None = None
    end: EarlyStop | None = None
    remote: RemoteCheckpoints | None = None
    """The object store that keeps the checkpoints too."""
    pushes: Pushes = field(default_factory=Pushes)
    """In what form inference is given the policy."""
    _optimizer: Optimizer | None = None

    @cached_property
    def use(self) -> DeviceUse:
        """Measures how much of its devices a step uses."""
        return DeviceUse(self.policy.model, self.train, self.ranks.world_size)

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser."""
        assert self._optimizer is not None, "start_optimizer comes first"
        return self._optimizer

    @property
    def checkpoint_dir(self) -> Path:
        """Folder that checkpoints are written into."""
        return checkpoint_folder(self.train, self.output_dir)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the policy before training."""
        return self.kind == "grpo" and _needs_reference(self.train)

    def start_optimizer(self, total_steps: int) -> None:
        """Makes the optimiser for a run of `total_steps` (0: not known)."""
        train = self.train
        schedule = Schedule.of(
            train.lr_scheduler_type,
            total_steps,
            warmup_steps=train.warmup_steps,
            warmup_ratio=train.warmup_ratio,
            cooldown_steps=train.cooldown_steps,
            final_fraction=train.final_lr_fraction,
        )
        self._optimizer = Optimizer(
            self.policy.trainable(), train, schedule, apart=_embeddings(self.policy.model), ranks=self.ranks
        )
        self.watch({})

    def watch(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Watches the run from here on, or from where a checkpoint's `state` left it."""
        if self.train.auto_lr_reduction:
            self.spikes = SpikeGuard(**state.get("spikes", {}))
            self.optimizer.scale = self.spikes.factor
        if self.train.early_stop:
            self.end = EarlyStop(**state.get("end", {}))


def checkpoint_folder(train: TrainConfig, output_dir: Path) -> Path:
    """Folder of this machine that checkpoints are written into: output_dir too where an object store keeps them."""
    named = train.checkpoint_dir
    return Path(named).expanduser() if named and not is_url(named) else output_dir


def load_session(
    kind: Kind, train: TrainConfig, output_dir: Path, weights: Path | None, ranks: Ranks | None = None
) -> TrainingSession:
    """Loads model, adapter and tokenizer; `weights` is the checkpoint folder to take them from, if there is one.

    With several ranks the model is spread over them. Raises ConfigError naming the key that is wrong.
    """
    ranks = ranks or Ranks()
    check(train)
    tokenizer = load_tokenizer(train)
    if train.lora:
        policy = _load_adapter(kind, train, output_dir, tokenizer, weights, ranks)
    else:
        model, precision = load_model(train, source=weights)
        _freeze(model, train)
        use_recipe(model, train)
        policy = Policy(model, precision, None, chunks=train.lmhead_chunks)
    use_recompute(policy.model, train)
    if kind == "grpo":
        policy.draw_nothing()
    else:
        policy.train(True)
    if ranks.world_size == 1:
        policy.compiled = compile_layers(policy.model, train, policy.precision)
    reference = _load_reference(train) if kind == "grpo" and _needs_reference(train) and not train.lora else None
    if policy.device.type == "cpu":
        keep_freed()
    if ranks.world_size > 1:
        policy.spread(train.zero_level)
        torch.manual_seed(train.train_seed + ranks.rank)  # dropout differs from rank to rank
    return TrainingSession(kind, train, output_dir, policy, tokenizer, reference, ranks)


def _load_adapter(
    kind: Kind,
    train: TrainConfig,
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    weights: Path | None,
    ranks: Ranks,
) -> Policy:
    merging = train.adapter_path is not None and train.adapter_init_mode == "merge"
    model, precision = load_model(train, quantize=not merging)
    if merging:
        model = lora.merge_adapter(model, str(train.adapter_path))
        if weights is None and ranks.first:
            save_base(model, precision, tokenizer, output_dir / BASE_FOLDER)
        quantization = quantization_of(train, model.config, model.dtype)
        if quantization is not None:
            quantize_layers(model, quantization)
    _check_quantized(model, train)
    use_recipe(model, train)
    adapter = lora.attach(model, train, dropout=0.0 if kind == "grpo" else train.lora_dropout)
    if kind == "grpo":
        check_shared(adapter)
    if adapts_experts(adapter) and ranks.world_size > 1:
        raise config_error("lora_target_modules", "names weights of experts, which cannot be adapted over several GPUs")
    if merging:
        adapter.peft_config["default"].base_model_name_or_path = str((output_dir / BASE_FOLDER).resolve())
    if weights is not None:
        lora.load_weights(adapter, weights, resumed=True)
    elif train.adapter_path is not None and not merging:
        lora.load_weights(adapter, lora.adapter_folder(train.adapter_path, "adapter_path"))
    return Policy(model, precision, adapter, chunks=train.lmhead_chunks)


def _check_quantized(model: PreTrainedModel, train: TrainConfig) -> None:
    """Raises ConfigError where QLoRA was asked for, and there is nothing that it could be."""
    if train.quantizes and not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        key = next(name for name in ("qlora_bnb", "qlora_fp8", "qlora_fp4") if getattr(train, name))
        why = f"no layer of the {type(model).__name__} is a linear layer that skip_quant_* does not leave out"
        raise config_error(key, f"is true, and nothing would be quantised: {why}; set it to false")


def _freeze(model: PreTrainedModel, train: TrainConfig) -> None:
    """Takes embeddings and output head out of training where the configuration says so; a shared one with either."""
    head = model.get_output_embeddings()
    if not train.train_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    if not train.train_lm_head and head is not None:
        head.requires_grad_(False)


def _embeddings(model: PreTrainedModel) -> list[str]:
    """Names of the weights of embeddings and output head."""
    modules = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return [
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if id(module) in modules
        for weight, _ in module.named_parameters()
    ]


def _needs_reference(train: TrainConfig) -> bool:
    return isinstance(train.loss.root, ClipLoss) and train.loss.root.beta > 0


def _load_reference(train: TrainConfig) -> Policy:
    """The model as it was before training, for full fine-tuning: a second copy."""
    model, precision = load_model(train)
    model.requires_grad_(False)
    model.to(torch.float32 if precision.autocast is None else precision.autocast)
    policy = Policy(model, precision, None, chunks=train.lmhead_chunks)
    policy.train(False)
    return policy
