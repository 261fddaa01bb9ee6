"""Quantities: `500m`, `16Gi`."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

_FORM = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?\d+)?")
_DECIMAL = {"m": Fraction(1, 1000), **{unit: Fraction(1000) ** i for i, unit in enumerate("kMGTPE", 1)}}
_BINARY = {f"{unit}i": Fraction(1024) ** i for i, unit in enumerate("KMGTPE", 1)}


def parse(value: Any) -> Fraction:
    """The number that a quantity stands for. Raises ValueError for what is none."""
    found = _FORM.fullmatch(str(value))
    if found is None or isinstance(value, bool):
        raise ValueError(f"{value!r} is no quantity")
    number, unit = Fraction(found[1]), found[2] or ""
    if unit[:1] in {"e", "E"} and unit[1:].lstrip("+-").isdigit():
        return number * Fraction(10) ** int(unit[1:])
    return number * (_DECIMAL | _BINARY).get(unit, Fraction(1))
