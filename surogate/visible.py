"""Text of others as people are shown it: what would move a terminal's cursor, or turn text round, is spelled out."""

from __future__ import annotations

import re

_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters other than tab and line feed, those of writing direction, and halves of characters."""


def visible(text: str) -> str:
    """The text with each such character as Python writes it: `\\x1b` for an escape."""
    return _HIDDEN.sub(lambda found: repr(found[0])[1:-1], text)
