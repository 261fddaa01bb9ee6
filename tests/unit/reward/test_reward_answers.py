"""Reading numbers and evening out answers."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_svc.rewards.normalise import normalise
from reward_svc.rewards.number import last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", "7"),
        ("the answer is 7.", "7"),
        ("3 + 4 = 7.0", "7.0"),
        ("9-2", "2"),
        ("9 - 12 = -3", "-3"),
        ("\u22123", "-3"),
        ("it is 1,200.50 dollars", "1200.50"),
        ("(4)-3", "3"),
        ("1, 2, 3,", "3"),
    ],
)
def test_last_number(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no idea", "-", "9" * 1000])
def test_no_number(text: str) -> None:
    assert last_number(text) is None


@given(st.text(), st.integers(min_value=-(10**15), max_value=10**15))
def test_a_number_after_any_text_is_found(text: str, value: int) -> None:
    assert last_number(f"{text} = {value}") == value


def test_normalisations_apply_in_order() -> None:
    assert normalise("  The  Cat, sat. ", ["strip", "lowercase", "punctuation", "articles", "whitespace"]) == "cat sat"
    assert normalise("total: 1,200.50", ["number"]) == "1200.5"
    assert normalise("100", ["number"]) == "100"
    assert normalise("none", ["number"]) == "none"
    assert normalise("\ufb01ne", ["unicode"]) == "fine"
