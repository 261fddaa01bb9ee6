"""The reward of reverse-text: bit-parallel LCS against the textbook's table."""

from hypothesis import given
from hypothesis import strategies as st

from reward_svc.rewards.lcs import lcs_length, lcs_ratio

TEXT = st.text(alphabet="abcd é😀", max_size=80)


def table_lcs(a: str, b: str) -> int:
    """The quadratic dynamic programme, as in every textbook."""
    previous = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b, start=1):
            row.append(previous[j - 1] + 1 if x == y else max(previous[j], row[j - 1]))
        previous = row
    return previous[-1]


@given(TEXT, TEXT)
def test_agrees_with_the_table(a: str, b: str) -> None:
    assert lcs_length(a, b) == table_lcs(a, b)


@given(TEXT, TEXT)
def test_ratio_is_symmetric_and_within_bounds(a: str, b: str) -> None:
    ratio = lcs_ratio(a, b)
    assert 0.0 <= ratio <= 1.0
    assert ratio == lcs_ratio(b, a)
    assert (ratio == 1.0) == (a == b)


def test_examples() -> None:
    assert lcs_ratio("olleh", "olleh") == 1.0
    assert lcs_ratio("hello", "olleh") == 2 * 2 / 10  # "ll"
    assert lcs_ratio("", "abc") == 0.0
    assert lcs_ratio("", "") == 1.0


def test_long_texts_cross_machine_words() -> None:
    a = "ab" * 500
    b = "ba" * 500
    assert lcs_length(a, b) == table_lcs(a, b) == 999
