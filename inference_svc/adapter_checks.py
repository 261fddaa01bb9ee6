"""Whether an announced LoRA adapter fits the served model, and is one that vLLM can serve."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from inference_svc.model_files import ModelFiles, TensorInfo
from inference_svc.violations import FLOATS, refuse, wrong_dtype
from surogate.errors import InvalidInputError, Violation
from surogate.v1 import weights_pb2

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
NESTED, NESTED_BEFORE = "model.language_model.", ("language_model.model.", "model.")
_UNSUPPORTED = ("use_dora", "lora_bias", "layer_replication", "modules_to_save", "alora_invocation_tokens")


def check_adapter(manifest: weights_pb2.WeightManifest, files: ModelFiles, max_rank: int) -> None:
    """Raises InvalidInputError naming the tensors, or the key, that are wrong."""
    config = _config(manifest.adapter_config_json)
    largest = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if largest > max_rank:
        why = (
            f"the adapter has rank {largest} (lora_rank), the replica takes {max_rank} at most; raise max_lora_rank in "
            "infer.yaml or lower lora_rank in train.yaml"
        )
        refuse([Violation("max_lora_rank", why)], reason="LORA_RANK_TOO_LARGE")
    refuse([*_wrong_tensors(manifest, files, config), *_lonely_halves(manifest)])


def _config(text: str) -> Mapping[str, Any]:
    """PEFT's adapter_config.json, checked for what vLLM cannot serve."""
    try:
        config = json.loads(text)
        rank, alpha = config["r"], config["lora_alpha"]
    except (ValueError, KeyError, TypeError) as error:
        why = f"is not an adapter_config.json with r and lora_alpha: {error}"
        raise InvalidInputError(f"manifest.adapter_config_json: {why}") from error
    wrong = [Violation(f"adapter_config.{key}", "is not supported") for key in _UNSUPPORTED if config.get(key)]
    if type(rank) is not int or rank < 1:
        wrong.append(Violation("adapter_config.r", f"{rank!r} is not a rank"))
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        wrong.append(Violation("adapter_config.lora_alpha", f"{alpha!r} is not a number"))
    if config.get("bias", "none") != "none":
        wrong.append(Violation("adapter_config.bias", "must be none"))
    if any(type(value) is not int or value < 1 for value in (config.get("rank_pattern") or {}).values()):
        wrong.append(Violation("adapter_config.rank_pattern", "must map names to ranks"))
    refuse(wrong)
    return dict(config)


def _wrong_tensors(
    manifest: weights_pb2.WeightManifest, files: ModelFiles, config: Mapping[str, Any]
) -> Iterator[Violation]:
    for spec in manifest.tensors:
        match = _TENSOR.fullmatch(spec.name)
        if match is None:
            yield Violation(spec.name, "is not a LoRA tensor (base_model.model.<module>.lora_A|B.weight)")
            continue
        target = _weight(match["module"], files)
        if target is None or len(target.shape) != 2:
            yield Violation(spec.name, f"the model has no linear layer {match['module']}")
            continue
        outputs, inputs = target.shape
        rank = _rank(match["module"], config)
        expected = [rank, inputs] if match["side"] == "A" else [outputs, rank]
        if list(spec.shape) != expected:
            yield Violation(spec.name, f"has shape {list(spec.shape)}; {expected} is expected")
        elif spec.dtype not in FLOATS:
            yield wrong_dtype(spec)


def _weight(module: str, files: ModelFiles) -> TensorInfo | None:
    """The weight that an adapter is on. The language model of one of several modalities is called otherwise in files
    from before transformers 4.52, and in those that vLLM has its names from."""
    names = (module, *(module.replace(NESTED, other, 1) for other in NESTED_BEFORE if module.startswith(NESTED)))
    return next((files.tensors[f"{name}.weight"] for name in names if f"{name}.weight" in files.tensors), None)


def _rank(module: str, config: Mapping[str, Any]) -> int:
    """PEFT's rule: the first pattern that is the module's name, or its end from a dot on."""
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return int(rank)
    return int(config["r"])


def _lonely_halves(manifest: weights_pb2.WeightManifest) -> list[Violation]:
    """Matrices A without B, or B without A."""
    known = {spec.name for spec in manifest.tensors}
    modules = {match["module"] for match in map(_TENSOR.fullmatch, known) if match}
    wanted = {f"base_model.model.{module}.lora_{side}.weight" for module in modules for side in "AB"}
    return [Violation(name, "is missing: its other half is there") for name in sorted(wanted - known)]
