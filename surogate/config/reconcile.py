"""Makes the three files of a GRPO job agree: what one leaves unset it takes from the others, differences are errors.

Works on the files' data before it is validated, so that a key may be required and yet be given by another file.
"""

from __future__ import annotations

import copy
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

from surogate.config.base import integral, shown
from surogate.config.lora import EXPERTS
from surogate.config.model import RunKeys
from surogate.config.types import DTYPES, parse_rope_scaling
from surogate.errors import Violation
from surogate.rope import as_object

MUST_AGREE = ": they must be the same"
Parts = dict[str, Any]
"""The data of the files, by their names: train, infer, orch."""


def _same_value(value: Any) -> Any:
    return integral(value)


def _same_path(value: Any) -> Any:
    return posixpath.normpath(value) if isinstance(value, str) else value


def _same_dtype(value: Any) -> Any:
    return DTYPES.get(value.lower(), value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Shared:
    """Keys of several files that mean the same.

    Attributes:
        keys: The keys, with the file in front.
        default: Value if none is set; None leaves all unset.
        unset: Values that count as unset, beside null.
        same: Values are equal if this makes them equal.
    """

    keys: tuple[str, ...]
    default: Any = None
    unset: tuple[Any, ...] = ()
    same: Callable[[Any], Any] = _same_value


SHARED = (
    Shared(("train.model", "infer.model", "orch.model.name"), same=_same_path),
    Shared(("train.max_steps", "orch.max_steps"), unset=(-1,)),
    Shared(("train.sequence_len", "orch.seq_len"), 2048),
    Shared(("train.max_async_level", "orch.max_async_level"), 1),
    Shared(("train.rope_scaling", "infer.rope_scaling")),
)
LORA_SHARED = (
    Shared(("train.lora_rank", "orch.model.lora_rank"), 16),
    Shared(("train.lora_alpha", "orch.model.lora_alpha"), 32),
)
DTYPE = Shared(("train.torch_dtype", "infer.dtype"), unset=("auto",), same=_same_dtype)
OUTPUT = Shared(("orch.output_dir", "train.output_dir"), "outputs/run_default", same=_same_path)


@dataclass(frozen=True)
class Reconciled:
    """The files' data, agreed, and what there is to say of it."""

    parts: Parts
    violations: list[Violation]
    warnings: list[Violation]


def reconcile(given: Mapping[str, Any]) -> Reconciled:
    """Makes the data of `train`, `infer` and `orch` agree. Data that are not mappings are left for validation to
    refuse.
    """
    parts = {name: copy.deepcopy(given[name]) for name in ("train", "infer", "orch")}
    violations: list[Violation] = []
    warnings: list[Violation] = []
    for shared in SHARED:
        violations += _agree(parts, shared)
    violations += _adapters(parts)
    if get(parts, "train.lora") is not False:
        for shared in LORA_SHARED:
            violations += _agree(parts, shared)
        _fill(parts, "infer.max_lora_rank", get(parts, "train.lora_rank"))
    warnings += _prefer(parts, DTYPE, ": sampler and trainer compute in different precisions, so their logprobs differ")
    warnings += _prefer(parts, OUTPUT, ": the job writes into the one of orch.yaml")
    _put(parts, "train.output_dir", get(parts, "orch.output_dir"))
    _stretch_alike(parts)
    warnings += _no_dropout(parts)
    _fill(parts, "infer.max_model_len", get(parts, "orch.seq_len"))
    _fill(parts, "infer.port", 0)
    for key, ours in (("orch.ckpt.interval", "save_steps"), ("orch.ckpt.keep_last", "save_total_limit")):
        value = get(parts, f"train.{ours}")
        _fill(parts, key, (RunKeys.model_fields[ours].default if value is None else value) or None)
    return Reconciled(parts, violations, warnings)


def get(parts: Parts, key: str) -> Any:
    """The value of a dotted key; None if it is not set."""
    value: Any = parts
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _put(parts: Parts, key: str, value: Any) -> None:
    """Sets a dotted key. A block on the way that is not a mapping stays as it is."""
    *blocks, last = key.split(".")
    block: Any = parts
    for name in blocks:
        if block.get(name) is None:
            block[name] = {}
        block = block[name]
        if not isinstance(block, dict):
            return
    block[last] = value


def _remove(parts: Parts, key: str) -> None:
    block, _, last = key.rpartition(".")
    inner = get(parts, block)
    if isinstance(inner, dict):
        inner.pop(last, None)


def _fill(parts: Parts, key: str, value: Any) -> None:
    if value is not None and get(parts, key) is None:
        _put(parts, key, value)


def _set_values(parts: Parts, shared: Shared) -> dict[str, Any]:
    values = {key: get(parts, key) for key in shared.keys}
    return {key: value for key, value in values.items() if value is not None and value not in shared.unset}


def _spread(parts: Parts, shared: Shared, value: Any) -> None:
    for key in shared.keys:
        if value is not None:
            _put(parts, key, value)
        elif get(parts, key) is None:
            _remove(parts, key)


def _agree(parts: Parts, shared: Shared) -> list[Violation]:
    """Spreads the one value of shared keys; a violation if they have several."""
    values = _set_values(parts, shared)
    if not values:
        _spread(parts, shared, shared.default)
        return []
    first, *others = values
    wrong = [key for key in others if shared.same(values[key]) != shared.same(values[first])]
    if wrong:
        return [
            Violation(key, f"is {_shown(values[key])}, and {first} is {_shown(values[first])}{MUST_AGREE}")
            for key in wrong
        ]
    _spread(parts, shared, values[first])
    return []


def _shown(value: Any) -> str:
    return shown(integral(value))


def _adapters(parts: Parts) -> list[Violation]:
    """`lora` and `enable_lora`: one that is not set is as the other, but for adapters on experts, which are not served.

    Adapters without `enable_lora` are pushed as weights that they are merged into.
    """
    if get(parts, "train.lora") is None:
        enabled = get(parts, "infer.enable_lora")
        _put(parts, "train.lora", True if enabled is None else enabled)
    lora, names = get(parts, "train.lora"), get(parts, "train.lora_target_modules")
    _fill(parts, "infer.enable_lora", lora and EXPERTS not in (names if isinstance(names, list) else [names]))
    if lora is False and get(parts, "infer.enable_lora") is True:
        return [Violation("infer.enable_lora", f"is true, and train.lora is false{MUST_AGREE}")]
    return []


def _prefer(parts: Parts, shared: Shared, otherwise: str) -> list[Violation]:
    """As `_agree`, with a warning where they differ."""
    found = _agree(parts, shared)
    return [Violation(item.field, item.description.removesuffix(MUST_AGREE) + otherwise) for item in found]


def _stretch_alike(parts: Parts) -> None:
    """Makes `rope_scaling` say by itself what it stretches to: `max_model_len` of infer.yaml is another length."""
    longest = get(parts, "train.max_model_len")
    if longest is None:
        return
    try:
        scaling = parse_rope_scaling(get(parts, "train.rope_scaling"))
    except PydanticCustomError:  # for validation to refuse
        return
    if scaling is not None:
        for name in ("train", "infer"):
            _put(parts, f"{name}.rope_scaling", as_object(scaling, longest))


def _no_dropout(parts: Parts) -> list[Violation]:
    given = get(parts, "train.lora_dropout")
    if isinstance(parts["train"], dict):
        _put(parts, "train.lora_dropout", 0.0)
    if not given:
        return []
    text = f"is {shown(given)}, and 0 is used: in GRPO the policy that is trained must be the one that was sampled"
    return [Violation("train.lora_dropout", text)]
