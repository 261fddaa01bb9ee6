"""Normalisations after which two answers are compared."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

import regex

from reward_svc.rewards.number import last_number

Normalisation = Literal["strip", "lowercase", "whitespace", "punctuation", "articles", "unicode", "number"]

_MANY_MARKS = regex.compile(r"[\p{M}\uff9e\uff9f]{30}")
_ARTICLES = frozenset({"a", "an", "the"})
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _number(text: str) -> str:
    value = last_number(text)
    if value is None:
        return text
    plain = f"{value:f}"
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def _nfkc(text: str) -> str:
    # Python sorts the combining characters of a letter in quadratic time, and no other thread runs meanwhile. After 30,
    # more than any language has, a joiner ends the letter: Unicode's Stream-Safe Text Format.
    if text.isascii():
        return text
    return unicodedata.normalize("NFKC", _MANY_MARKS.sub(lambda marks: f"{marks.group()}\u034f", text))


_RULES: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lowercase": str.casefold,
    "whitespace": lambda text: " ".join(text.split()),
    "punctuation": lambda text: text.translate(_NO_PUNCTUATION),
    "articles": lambda text: " ".join(word for word in text.split() if word.casefold() not in _ARTICLES),
    "unicode": _nfkc,
    "number": _number,
}


def normalise(text: str, rules: Sequence[Normalisation]) -> str:
    """Applies `rules` to `text`, in order.

    strip: no white space at the ends. lowercase: Unicode case folding. whitespace: runs of white space become one
    space. punctuation: ASCII punctuation is dropped. articles: the words a, an, the are dropped. unicode: NFKC.
    number: the last number of the text in plain notation (`1,200.50` becomes `1200.5`), the text itself without one.
    """
    for rule in rules:
        text = _RULES[rule](text)
    return text
