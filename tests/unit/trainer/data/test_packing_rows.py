"""Best-fit decreasing, and the plan of steps over packed rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_svc.worker.data.packing import efficiency, pack
from trainer_svc.worker.data.plan import StepPlan
from trainer_svc.worker.data.store import EncodedData
from trainer_svc.worker.model.batch import Document

LENGTHS = st.lists(st.integers(1, 20), max_size=60)


@given(LENGTHS, st.integers(20, 50), st.integers(1, 20))
def test_every_document_is_in_one_row_and_no_row_overflows(lengths: list[int], capacity: int, window: int) -> None:
    rows = pack(lengths, capacity, window=window)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[document] for document in row) <= capacity for row in rows)


@given(LENGTHS)
def test_rows_are_few(lengths: list[int]) -> None:
    """Any two rows of a window together exceed the capacity: else the later one would have gone into the other."""
    loads = sorted(sum(lengths[document] for document in row) for row in pack(lengths, 20))
    assert len(loads) < 2 or loads[0] + loads[1] > 20


def test_the_fullest_row_with_room_is_taken() -> None:
    assert pack([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]


def test_a_document_that_is_too_long_is_an_error() -> None:
    with pytest.raises(ValueError, match="document 1 has 11 tokens"):
        pack([3, 11], 10)


def test_efficiency_is_the_part_that_is_filled() -> None:
    assert efficiency([6, 5, 4, 3], [[0, 2], [1, 3]], 10) == 0.9


def data_of(lengths: list[int]) -> EncodedData:
    return EncodedData(Document(np.arange(length), np.ones(length, dtype=np.bool_)) for length in lengths)


def plan_of(data: EncodedData, **changes: object) -> StepPlan:
    settings = {"capacity": 16, "packing": True, "rows": 2, "micro_batches": 3, "seed": 7, **changes}
    return StepPlan(data, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_sees_every_document_once(packing: bool) -> None:
    data = data_of([3, 5, 16, 9, 2, 2, 7, 11, 4, 8, 1, 6] * 5)
    plan = plan_of(data, packing=packing)
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = [document for step in steps for batch in plan.micro_batches(step) for document in batch]
        assert sorted(seen) == list(range(len(data)))


def test_order_follows_from_seed_and_step_alone() -> None:
    data = data_of(list(range(1, 16)) * 4)
    plan, again = plan_of(data), plan_of(data)
    last = 3 * plan.steps_per_epoch - 1
    for step in range(last):
        plan.micro_batches(step)
    assert plan.micro_batches(last) == again.micro_batches(last)
    assert plan.micro_batches(0) != plan_of(data, seed=8).micro_batches(0)
    assert plan.micro_batches(0) != plan.micro_batches(plan.steps_per_epoch)


def test_without_packing_a_row_is_a_document() -> None:
    plan = plan_of(data_of([3] * 12), packing=False)
    assert [len(batch) for batch in plan.micro_batches(0)] == [2, 2, 2]
    assert plan.steps_per_epoch == 2


@pytest.mark.parametrize(("capacity", "samples"), [(2048, 20_000), (2048, 500), (8192, 20_000)])
def test_a_realistic_mix_of_lengths_uses_nearly_all_positions(capacity: int, samples: int) -> None:
    """Chats: lengths are log-normal with a median of 350 tokens and a long tail, cut at the row's length."""
    lengths = np.random.default_rng(0).lognormal(np.log(350), 0.9, samples).astype(int).clip(16, capacity).tolist()
    assert efficiency(lengths, pack(lengths, capacity), capacity) >= 0.97


def test_rollouts_of_a_step_use_nearly_all_positions() -> None:
    """128 rollouts, many of them cut at the limit of 512 tokens, in rows of 2,048."""
    lengths = np.random.default_rng(1).lognormal(np.log(300), 0.6, 128).astype(int).clip(30, 512).tolist()
    assert efficiency(lengths, pack(lengths, 2048, window=len(lengths)), 2048) >= 0.97
