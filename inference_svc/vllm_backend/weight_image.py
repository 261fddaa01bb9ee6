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
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


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
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ImageUpdate) -> None:
        """Loads the files. A failure leaves the model unusable until a later update loads it whole."""
        try:
            with ExitStack() as stack:
                self.model.load_weights(_tensors(update_info.paths, stack))
        except BaseException:
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        """Processes what only the whole model can tell, such as attention scales."""
        finalize_layerwise_reload(self.model, self.model_config)
        _pack_tied_heads(self.model)

    def shutdown(self) -> None:
        """Nothing to release."""


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
