"""What the checks of weight updates share: naming what is wrong, a few at a time."""

from __future__ import annotations

from surogate.errors import InvalidInputError, Violation
from surogate.v1 import common_pb2, weights_pb2
from surogate.weights.image import dtype_name

FLOATS = frozenset({common_pb2.DTYPE_F32, common_pb2.DTYPE_F16, common_pb2.DTYPE_BF16})
"""Element types of weights; loading converts them to the served one."""
_SHOWN = 8


def wrong_dtype(spec: weights_pb2.TensorSpec) -> Violation:
    """For a tensor that is not one of FLOATS."""
    return Violation(spec.name, f"has type {dtype_name(spec.dtype)}; a 16- or 32-bit float is expected")


def refuse(wrong: list[Violation], *, reason: str = "UPDATE_DOES_NOT_FIT") -> None:
    """Raises InvalidInputError with the first violations, if there are any."""
    if not wrong:
        return
    shown = "\n".join(map(str, wrong[:_SHOWN]))
    more = f"\nand {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    raise InvalidInputError(shown + more, violations=wrong[:_SHOWN], reason=reason)
