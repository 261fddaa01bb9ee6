"""Full weights from safetensors files into a running vLLM worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.platforms import current_platform

_COPIED = {"GptOssForCausalLM": ("RoutedExperts", "OAIAttention")}
"""Models of vLLM that copy weights of some of their layers by themselves, past the loaders of the weights."""


@dataclass
class ImageInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing has to be agreed beforehand."""


@dataclass
class ImageUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Safetensors files that hold the whole checkpoint between them; of a tensor in several, the first file counts."""

    paths: list[str] = field(default_factory=list)


class ImageWeightTransferEngine(WeightTransferEngine[ImageInit, ImageUpdate]):  # type: ignore[misc]
    """Loads checkpoint-format tensors layer by layer, as vLLM does at start, into the storage that is in use.

    Layers must come whole: on CPUs vLLM keeps packed weights only, which cannot be written in part.
    """

    init_info_cls = ImageInit
    update_info_cls = ImageUpdate

    def init_transfer_engine(self, init_info: ImageInit) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Makes every layer expect new weights."""
        if current_platform.is_cpu():
            _forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)
        for layer in _copied_layers(self.model):
            materialize_layer(layer, get_layerwise_info(layer))

    def receive_weights(self, update_info: ImageUpdate) -> None:
        """Loads the files. A failure leaves the model unusable until a later update loads it whole."""
        try:
            with ExitStack() as stack:
                self.model.load_weights(_tensors(update_info.paths, stack))
            for layer in _copied_layers(self.model):
                _layerwise_process(layer, get_layerwise_info(layer))
            _check_loaded(self.model)
        except BaseException:
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        """Processes what only the whole model can tell, such as attention scales."""
        finalize_layerwise_reload(self.model, self.model_config)
        _pack_tied_heads(self.model)

    def shutdown(self) -> None:
        """Nothing to release."""


def _copied_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Layers that the layerwise reload does not hear of: they get memory beforehand, and are processed at the end."""
    names = set(_COPIED.get(type(model).__name__, ()))
    return [layer for layer in model.modules() if names & {kind.__name__ for kind in type(layer).__mro__}]


def _check_loaded(model: torch.nn.Module) -> None:
    """Raises ValueError where weights of a layer did not arrive: vLLM would go on with its old ones."""
    own = {name: _used_weights(layer) for name, layer in model.named_modules()}
    waiting = {name for name, layer in model.named_modules() if _waits(layer)}
    loaded = {id(weight) for name, weights in own.items() if name not in waiting for weight in weights}
    missed = [name for name in own if name in waiting and any(id(weight) not in loaded for weight in own[name])]
    if missed:
        kind = type(model).__name__
        raise ValueError(f"vLLM's {kind} takes no new weights for {', '.join(missed[:4])}; train with lora: true")


def _waits(layer: torch.nn.Module) -> bool:
    """Whether no new weight of a layer has come yet."""
    info = get_layerwise_info(layer)
    return info.can_load() and not info.load_numel


def _used_weights(layer: torch.nn.Module) -> list[torch.Tensor]:
    """The weights that a layer itself computes with, before and after the update; what is tied has the same ones."""
    before = get_layerwise_info(layer).kernel_tensors
    return list(before[0].values() if before is not None else layer.parameters(recurse=False))


def _forget_packed_experts(model: torch.nn.Module) -> None:
    """Has experts be packed anew from the weights to come, as when they are loaded first.

    vLLM packs them for CPUs only when it makes their kernel: with one there it would put plain weights in the place of
    packed ones, and compute nonsense.
    """
    for layer in model.modules():
        if isinstance(method := getattr(layer, "quant_method", None), UnquantizedFusedMoEMethod):
            method.moe_kernel = None


def _pack_tied_heads(model: torch.nn.Module) -> None:
    """Packs output heads anew from the weights that they share with the embedding.

    A head that is tied is not loaded itself, so the layerwise reload leaves alone what vLLM packed from the old
    weights on CPUs.
    """
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
            layer.quant_method.process_weights_after_loading(layer)


def _tensors(paths: list[str], stack: ExitStack) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) in the order of names, which keeps a layer's tensors together."""
    files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
    sources = {name: file for file in reversed(files) for name in file.keys()}  # noqa: SIM118 - no mapping
    for name in sorted(sources):
        yield name, sources[name].get_tensor(name)
