"""Long texts are tokenized window by window: the tokens are those of the whole text, or the text is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from surogate.errors import ConfigError
from tests.helpers.models.engine import open_engine
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.models.tokenizer_kinds import KINDS, make_tokenizer
from trainer_svc.worker.data import encode as encoding
from trainer_svc.worker.data import long_text
from trainer_svc.worker.data.chat import Rendered
from trainer_svc.worker.data.encode import encode

WORDS = (
    "the quick brown fox, it's gone in 1234 seconds. Grüße 你好, мир! 🙂🙂  \n\n def f(x):\n    return x[::-1]   "
    f"they're  \t\t <|im_end|> user assistant {'a' * 40} "
).split(" ")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "WINDOW", 2000)
    monkeypatch.setattr(encoding, "WINDOW", 2000)
    monkeypatch.setattr(long_text, "OVERLAPS", (300, 1000))


def words(number: int) -> str:
    draw = random.Random(0)
    return " ".join(draw.choice(WORDS) for _ in range(number))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_the_whole_text(tmp_path: Path, kind: str) -> None:
    make_tokenizer(kind, tmp_path)
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path), words(2500)
    for special in (True, False):
        found = long_text.tokenize(text, tokenizer, special_tokens=special)
        whole = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        assert found.ids.tolist() == whole["input_ids"]
        assert found.offsets.tolist() == [[*pair] for pair in whole["offset_mapping"]]


def test_long_and_short_texts_keep_their_order_and_what_is_learned(tmp_path: Path) -> None:
    make_tokenizer("qwen", tmp_path)
    tokenizer, long = AutoTokenizer.from_pretrained(tmp_path), words(900)
    rendered = [Rendered("one two", ((4, 7),)), Rendered(long, ((1500, len(long)),)), Rendered("three", ((0, 5),))]
    first, second, third = encode(rendered, tokenizer, raw_text=False)
    assert [tokenizer.decode(document.token_ids) for document in (first, second, third)] == ["one two", long, "three"]
    starts = [start for start, _ in tokenizer(long, return_offsets_mapping=True)["offset_mapping"]]
    assert second.mask.tolist() == [start >= 1500 for start in starts]
    assert third.mask.all()


def test_a_text_without_a_place_to_cut_is_refused_by_its_row(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", vocab_size=600)
    # To WordPiece a word of more than 100 characters is one unknown token.
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "short": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]").save_pretrained(tmp_path / "model")
    lines = [json.dumps({"text": text}) for text in ("short a", "x" * 9000)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    train = {"model": str(tmp_path / "model"), "datasets": [{"path": str(tmp_path / "data.jsonl"), "type": "text"}]}
    with pytest.raises(
        ConfigError, match=r"train\.datasets\.0\.path: row 2 has 9,000 characters, in which there is no"
    ):
        open_engine("pt", tmp_path / "out", {**train, "sequence_len": 64, "lora": False})
