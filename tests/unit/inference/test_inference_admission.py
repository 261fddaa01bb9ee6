"""Admission: how many sequences are taken, and when to come back."""

from __future__ import annotations

import pytest

from inference_svc.admission import Admission
from surogate.errors import BusyError


def test_places_are_held_and_given_back() -> None:
    admission = Admission(running=2, waiting=3)
    with admission.admit(4):
        assert (admission.in_flight, admission.queue_length) == (4, 2)
        with admission.admit(1), pytest.raises(BusyError), admission.admit(1):
            pass
        assert admission.in_flight == 4
    assert (admission.in_flight, admission.queue_length) == (0, 0)


def test_one_call_may_be_larger_than_the_queue_when_it_is_alone() -> None:
    admission = Admission(running=1, waiting=1)
    with admission.admit(10), pytest.raises(BusyError), admission.admit(1):
        pass


def test_the_further_over_the_limit_the_longer_the_wait() -> None:
    admission = Admission(running=1, waiting=0)

    def wait(sequences: int) -> float:
        with pytest.raises(BusyError) as caught, admission.admit(sequences):
            pass
        return caught.value.retry_after

    with admission.admit(1):
        assert 0 < wait(1) < wait(5) <= 30
