"""Finds the number that a completion answers with."""

from __future__ import annotations

import re
from decimal import Decimal

# A minus sign belongs to the number unless a digit or a closing bracket stands before it: `9-2` ends with 2.
_NUMBER = re.compile(r"(?<![\d)])-?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?")
_MAX_DIGITS = 400


def last_number(text: str) -> Decimal | None:
    """Returns the last decimal number in `text`, thousands separators removed, or None if there is none.

    Numbers of more than 400 characters count as none: no answer is that long.
    """
    last = None
    for match in _NUMBER.finditer(text.replace("\u2212", "-")):
        last = match.group()
    if last is None or len(last) > _MAX_DIGITS:
        return None
    return Decimal(last.replace(",", ""))
