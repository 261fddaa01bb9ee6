"""How many floating-point operations a training step needs, and what a device can do: the two numbers of an MFU.

Counted are products of matrices and attention, forward and backward, as the model needs them: what is computed a
second time (recomputation) does not count, nor do norms, activations and the optimiser.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from trainer_svc.worker.quantized.linear import QuantizedLinear

PEAK_TFLOPS = {
    "B200": 2250.0,
    "B100": 1800.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 6000 Ada": 364.2,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Dense bfloat16 products of tensor cores, 10¹² operations a second, as the maker publishes them, by a part of the
device's name; the first that is part of it counts.
"""


def device_peak(device: torch.device) -> float | None:
    """Operations a second that the device's maker promises; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


class StepFlops:
    """Operations of training a model: of each token and of each pair of tokens that see each other."""

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
        self._token = sum(_of_layer(layer) for layer in layers) + _of_experts(model)
        self._predicted = 0.0 if head is None else _of_layer(head)
        config = model.config.get_text_config()
        # Scores and weighted values, 2 operations a product each, forward once and backward twice.
        self._pair = 12.0 * sum(_attention_width(layer) for layer in _layers(config))

    def of(self, lengths: Iterable[int], predicted: int) -> float:
        """Operations for documents of these lengths, of whose tokens `predicted` are learned.

        A token sees itself and those before it: windows of attention are not taken into account.
        """
        lengths = list(lengths)
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        total: float = self._token * sum(lengths) + self._predicted * predicted + self._pair * pairs
        return total


def _layers(config: Any) -> list[Any]:
    """The configuration of each layer; some families have layers that differ."""
    every = getattr(config, "is_heterogeneous", False)
    return list(config.per_layer_config) if every else [config] * config.num_hidden_layers


def _attention_width(layer: Any) -> int:
    """Dimensions of all heads together."""
    heads = int(layer.num_attention_heads)
    return heads * int(getattr(layer, "head_dim", None) or layer.hidden_size // heads)


def _of_layer(layer: torch.nn.Linear) -> float:
    """2 a weight for the product, 2 for the gradient of what goes in, and 2 for that of the weight if it is trained."""
    trained = not isinstance(layer, QuantizedLinear) and layer.weight.requires_grad
    return (6.0 if trained else 4.0) * float(layer.in_features * layer.out_features)


def _of_experts(model: PreTrainedModel) -> float:
    """The same for experts, which are stacked in tensors [experts, out, in], of those that a token goes through."""
    config = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    if chosen is None:
        return 0.0
    stacks = [weight for name, weight in model.named_parameters() if weight.dim() == 3 and "experts" in name]
    return sum((6.0 if w.requires_grad else 4.0) * float(w.numel() // w.shape[0] * chosen) for w in stacks)
