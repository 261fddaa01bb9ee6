"""Data are tokenized once: what the key holds, that entries are whole, and how much memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surogate import caches
from surogate.config.train import TrainConfig
from surogate.errors import ConfigError, DataLossError
from tests.helpers.models.tiny import PLAIN_CHAT_TEMPLATE, VOCAB_SIZE, make_tiny_tokenizer
from trainer_svc.worker.data import cache
from trainer_svc.worker.data.prepare import SessionData, prepare
from trainer_svc.worker.data.store import DocumentWriter, EncodedData
from trainer_svc.worker.model.batch import Document

CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{n}"}]} for n in range(9)]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(caches.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    return path


def run(path: Path, *, template: str | None = None, vocab_size: int = VOCAB_SIZE, **keys: Any) -> SessionData:
    tokenizer = make_tiny_tokenizer(**({} if template is None else {"chat_template": template}))
    entry = {"path": str(path), "type": "conversation", **keys.pop("entry", {})}
    train = {"model": "m", "optimizer": "adamw", "datasets": [entry], **keys}
    return prepare(TrainConfig.model_validate(train), tokenizer, vocab_size, keys.get("warn", lambda text: None))


def contents(data: EncodedData) -> list[tuple[list[int], list[bool]]]:
    return [(data[index].token_ids.tolist(), data[index].mask.tolist()) for index in range(len(data))]


def test_what_was_written_is_read_back_the_same(tmp_path: Path) -> None:
    documents = [Document(np.arange(n) * 70_000, np.arange(n) % 2 == 1) for n in (3, 1, 7)]
    with DocumentWriter(tmp_path) as writer:
        for document in documents:
            writer.add(document)
    mapped = EncodedData.load(tmp_path)
    assert contents(mapped) == contents(EncodedData(documents))
    assert mapped.lengths.tolist() == [3, 1, 7]
    assert mapped.num_tokens == 11


def test_no_documents_are_read_back_as_none(tmp_path: Path) -> None:
    with DocumentWriter(tmp_path):
        pass
    assert len(EncodedData.load(tmp_path)) == 0


def test_a_second_run_finds_its_tokens(data: Path) -> None:
    first, second = run(data), run(data)
    assert (first.cached, second.cached) == (False, True)
    assert contents(first.training) == contents(second.training)
    assert first.held_out is not None and second.held_out is not None
    assert contents(first.held_out) == contents(second.held_out)
    assert first.counts == second.counts


def test_keys_that_change_no_token_do_not_matter(data: Path) -> None:
    run(data)
    assert run(data, learning_rate=1.0, per_device_train_batch_size=7, train_seed=3, output_dir="elsewhere").cached


@pytest.mark.parametrize(
    "change",
    [
        {"system": "Be good."},
        {"max_length": 100},
        {"sequence_len": 99},
        {"truncation_strategy": "left"},
        {"loss_scale": "all"},
        {"response_prefix": "So: "},
        {"use_chat_template": False},
        {"validation_split_ratio": 0.5},
        {"eval_seed": 9},
        {"entry": {"samples": 5}},
        {"entry": {"message_property_mappings": {"role": "role", "content": "content", "name": "n"}}},
        {"template": PLAIN_CHAT_TEMPLATE},
        {"vocab_size": VOCAB_SIZE + 1},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_keys_that_change_tokens_do(data: Path, change: dict[str, Any]) -> None:
    run(data)
    assert not run(data, **change).cached
    assert run(data).cached


def test_a_file_that_changed_is_read_again(data: Path) -> None:
    run(data)
    text = data.read_text().replace("b0", "c0")  # as long as before
    data.write_text(text)
    again = run(data, validation_split_ratio=0.1)
    assert not again.cached


def test_warnings_are_given_again(data: Path) -> None:
    said: list[list[str]] = [[], []]
    for found in said:
        entry = {"path": str(data), "type": "conversation"}
        train = TrainConfig.model_validate(
            {
                "model": "m",
                "datasets": [entry],
                "max_length": 5,
                "loss_scale": "all",
                "truncation_strategy": "right",
                "optimizer": "adamw",
            }
        )
        prepare(train, make_tiny_tokenizer(), VOCAB_SIZE, found.append)
    assert said[0] == said[1] != []


@pytest.mark.parametrize("damage", ["cut", "deleted", "no meta"])
def test_an_entry_that_is_not_whole_is_made_again(data: Path, damage: str) -> None:
    first = run(data)
    before = contents(first.training)
    tokens = first.folder / "training" / "tokens.i32"
    match damage:
        case "cut":
            os.truncate(tokens, 8)
        case "deleted":
            tokens.unlink()
        case "no meta":
            (first.folder / cache.META).unlink()
    again = run(data)
    assert not again.cached
    assert contents(again.training) == before


def test_several_at_once_build_an_entry_once(root: Path) -> None:
    root.mkdir(parents=True)
    built = []

    def build(folder: Path) -> dict[str, Any]:
        built.append(folder)
        (folder / "x").write_bytes(b"1" * 1000)
        return {"n": len(built)}

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cache.fetch("k", build), range(16)))
    assert len(built) == 1
    assert {folder for folder, _ in found} == {root / "k"}
    assert {meta["n"] for _, meta in found} == {1}


def test_a_build_that_fails_leaves_nothing(data: Path, root: Path) -> None:
    with pytest.raises(ConfigError, match="no column"):
        run(data, entry={"messages_field": "talk"})
    assert [path for path in root.iterdir() if path.is_dir()] == []


def test_a_disk_that_refuses_is_an_error_that_names_the_variable(root: Path) -> None:
    root.mkdir(parents=True)

    def build(folder: Path) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataLossError, match=r"No space left.*SUROGATE_CACHE_DIR"):
        cache.fetch("k", build)


def test_a_folder_that_cannot_be_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(caches.VARIABLE, str(tmp_path / "file" / "below"))
    with pytest.raises(DataLossError, match="SUROGATE_CACHE_DIR names"):
        caches.cache_root(cache.TOKENS)


def test_what_was_not_used_for_long_goes(data: Path, root: Path) -> None:
    old = run(data).folder
    os.utime(old / cache.META, (0, 0))
    run(data, max_length=50)
    assert not old.exists()


MEASURE = """
import json, sys, threading, time
from pathlib import Path
from surogate.config.train import TrainConfig
from tests.helpers.models.tiny import VOCAB_SIZE, make_tiny_tokenizer
from trainer_svc.worker.data.prepare import prepare

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

tokenizer = make_tiny_tokenizer()
def prepared(path):
    entry = {"path": path, "type": "text"}
    train = TrainConfig.model_validate({"model": "m", "optimizer": "adamw", "datasets": [entry], "sequence_len": 4096})
    return prepare(train, tokenizer, VOCAB_SIZE, lambda text: None)

prepared(sys.argv[1])  # everything is imported, and its batches are as large as any
start, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.005)
watcher = threading.Thread(target=watch)
watcher.start()
data = prepared(sys.argv[2])
checksum = sum(int(data.training[i].token_ids.sum()) for i in range(len(data.training)))
done = True
watcher.join()
print(json.dumps({"grown": peak - start, "tokens": data.training.num_tokens, "checksum": checksum}))
"""


def rows_of(megabytes: int) -> Iterator[str]:
    """One-token bytes in rows of 20 kB."""
    for number in range(50 * megabytes):
        yield json.dumps({"text": f"{number:09d} " * 2000}) + "\n"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured by Linux's /proc")
def test_a_corpus_takes_no_memory_of_its_size(tmp_path: Path) -> None:
    """12 million tokens are 168 MB as documents and arrays in memory; they are written and read again in less."""
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    small.write_text("".join(rows_of(2)))
    large.write_text("".join(rows_of(12)))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)], capture_output=True, text=True, check=True, timeout=240
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] > 10_000_000
    assert found["grown"] < 80 << 20
