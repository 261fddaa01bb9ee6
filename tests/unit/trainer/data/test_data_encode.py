"""Raw text, and documents that are too long."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.models.tiny import make_tiny_tokenizer
from trainer_svc.worker.data.chat import Rendered
from trainer_svc.worker.data.encode import batched, encode, fit
from trainer_svc.worker.model.batch import Document, collate


def document(length: int, first_learned: int = 0) -> Document:
    return Document(np.arange(length), np.arange(length) >= first_learned)


def test_raw_text_ends_with_the_end_token() -> None:
    tokenizer = make_tiny_tokenizer()
    (found,) = encode([Rendered("ab", None, special_tokens=True)], tokenizer, raw_text=True)
    assert tokenizer.decode(found.token_ids) == "ab<|im_end|>"
    assert found.mask.all()


def test_short_documents_stay_as_they_are() -> None:
    whole = document(10)
    assert fit(whole, 10, "delete") == [whole]


@pytest.mark.parametrize(("strategy", "kept"), [("left", range(4, 10)), ("right", range(6)), ("delete", None)])
def test_cut(strategy: str, kept: range | None) -> None:
    parts = fit(document(10), 6, strategy)  # type: ignore[arg-type]
    assert [part.token_ids.tolist() for part in parts] == ([list(kept)] if kept else [])


@pytest.mark.parametrize("length", [7, 11, 12, 16, 17])
def test_split_learns_every_token_but_the_first_exactly_once(length: int) -> None:
    parts = fit(document(length), 6, "split")
    learned = [int(token) for part in parts for token in part.token_ids[part.trained]]
    assert learned == list(range(1, length))
    assert all(2 <= len(part) <= 6 for part in parts)


def test_a_row_ends_before_the_last_learned_token() -> None:
    mask = np.array([False, False, True, True, False, False])
    batch = collate([Document(np.arange(10, 16), mask), Document(np.arange(20, 23), np.ones(3, dtype=bool))])
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.predict.tolist() == [1, 2, 3, 4]
    assert batch.targets.tolist() == [12, 13, 21, 22]
    assert batch.owner.tolist() == [0, 0, 1, 1]


def test_a_row_is_padded_by_a_document_of_its_own() -> None:
    batch = collate([document(6)], pad_to_multiple_of=8, pad_id=99)
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4, 99, 99, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 0, 0]]  # none further than its documents'
    assert len(batch.targets) == 5


def test_a_batch_without_anything_to_learn_is_an_error() -> None:
    with pytest.raises(ValueError, match="no document of the batch"):
        collate([document(5, first_learned=5)])


def test_padding_on_the_left_moves_what_is_predicted() -> None:
    right, left = (collate([document(6)], pad_to_multiple_of=8, padding_side=side) for side in ("right", "left"))
    assert left.input_ids.tolist() == [[0, 0, 0, 0, 1, 2, 3, 4]]
    assert left.position_ids.tolist() == [[0, 0, 0, 0, 1, 2, 3, 4]]
    assert left.predict.tolist() == [place + 3 for place in right.predict.tolist()]
    assert left.targets.tolist() == right.targets.tolist()


def test_texts_are_tokenized_in_batches_of_a_bounded_size() -> None:
    texts = [Rendered("x" * 300_000, None), Rendered("y" * 300_000, None), *[Rendered("z", None)] * 1500]
    sizes = [len(batch) for batch in batched(texts)]
    assert sizes == [2, 1000, 500]


@pytest.mark.parametrize("side", ["left", "right"])
def test_documents_of_nearly_one_length_are_padded_each(side: str) -> None:
    batch = collate([document(n) for n in (257, 256, 250)], block=128, padding_side=side)  # type: ignore[arg-type]
    assert batch.input_ids.shape == (1, 3 * 256)
    assert batch.documents.even
    assert batch.position_ids.max() == 255
    assert batch.predict.tolist() == [*range(256), *range(256, 511), *range(512, 761)]


def test_other_documents_share_the_padding_of_their_row() -> None:
    batch = collate([document(n) for n in (100, 20, 5)], block=128)
    assert batch.input_ids.shape == (1, 128)
    assert not batch.documents.even
