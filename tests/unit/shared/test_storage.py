"""Models, data and folders in an object store, against moto's server: fetched whole, uploaded whole, tried again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from surogate.caches import VARIABLE
from surogate.errors import ConfigError, DataLossError
from surogate.storage import folders, objects
from surogate.storage.fetch import TEXT, fetch, local
from surogate.storage.objects import Objects, StorageError
from tests.helpers.object_store import BUCKET, Store, object_store

URL = f"s3://{BUCKET}/runs/a"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(objects, "FIRST_PAUSE", 0.01)
    with object_store(monkeypatch) as store:
        yield store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-3"
    (folder / "trainer_state").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "trainer_state" / "state.json").write_text("{}")
    return folder


def test_a_model_is_fetched_once_and_again_when_it_has_changed(store: Store) -> None:
    store.put("models/m/config.json", b"{}")
    store.put("models/m/sub/model.safetensors", b"one")
    url = f"s3://{BUCKET}/models/m"
    first = fetch(url, "train.model")
    assert first.name == "m"
    assert (first / "sub" / "model.safetensors").read_bytes() == b"one"
    before = len([path for method, path in store.requests if method == "GET" and path.endswith("safetensors")])
    assert fetch(url, "train.model") == first
    after = len([path for method, path in store.requests if method == "GET" and path.endswith("safetensors")])
    assert before == after == 1
    store.put("models/m/sub/model.safetensors", b"two")
    assert (fetch(url, "train.model") / "sub" / "model.safetensors").read_bytes() == b"two"
    assert (first / "sub" / "model.safetensors").read_bytes() == b"one", "who reads the old one goes on"


def test_only_what_is_needed_of_a_model_is_fetched(store: Store) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors"):
        store.put(f"models/m/{name}", b"x")
    path = fetch(f"s3://{BUCKET}/models/m", "train.model", only=TEXT)
    assert sorted(file.name for file in path.iterdir()) == ["chat_template.jinja", "tokenizer.json"]


def test_a_single_object_keeps_its_name(store: Store) -> None:
    store.put("data/train.jsonl", b'{"text": "a"}\n')
    store.put("data/train.jsonl.bak", b"not this one")
    path = Path(local(f"s3://{BUCKET}/data/train.jsonl", "train.datasets.0.path"))
    assert path.name == "train.jsonl"
    assert path.read_bytes() == b'{"text": "a"}\n'
    assert local("Qwen/Qwen3-0.6B", "train.model") == "Qwen/Qwen3-0.6B"


def test_processes_that_fetch_at_once_get_the_same_folder(store: Store) -> None:
    store.put("models/m/config.json", b"{}")
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: fetch(f"s3://{BUCKET}/models/m", "train.model"), range(4)))
    assert len(found) == 1
    assert len([path for method, path in store.requests if method == "GET" and path.endswith("config.json")]) == 1


def test_what_is_not_there_names_the_key(store: Store) -> None:
    with pytest.raises(ConfigError, match="there is nothing at s3://bucket/nothing") as caught:
        fetch(f"s3://{BUCKET}/nothing", "infer.model")
    assert caught.value.violations[0].field == "infer.model"
    with pytest.raises(ConfigError, match="no-such-bucket"):
        fetch("s3://no-such-bucket/m", "infer.model")


def test_refused_credentials_are_no_reason_to_try_again(store: Store) -> None:
    store.fail = lambda method, path: "403 Forbidden"
    with pytest.raises(ConfigError, match="access is denied"):
        fetch(f"s3://{BUCKET}/m", "train.model")
    assert len(store.requests) <= 3


def test_names_that_lead_out_of_the_cache_are_refused(store: Store) -> None:
    store.put("evil/../../../etc/passwd", b"x")
    with pytest.raises(ConfigError, match="which is no file's"):
        fetch(f"s3://{BUCKET}/evil", "train.model")


def test_a_fetch_that_is_cut_leaves_nothing(store: Store, tmp_path: Path) -> None:
    for index in range(3):
        store.put(f"models/m/{index}.bin", b"x" * 10)
    store.fail = lambda method, path: "503 Slow Down" if path.endswith("2.bin") else None
    with pytest.raises(StorageError, match="after 6 attempts"):
        fetch(f"s3://{BUCKET}/models/m", "train.model")
    assert [path for path in (tmp_path / "cache" / "objects").iterdir() if path.is_dir()] == []
    store.fail = lambda method, path: None
    assert len(list(fetch(f"s3://{BUCKET}/models/m", "train.model").iterdir())) == 3


def test_a_folder_is_seen_when_all_of_it_is_there(store: Store, folder: Path, tmp_path: Path) -> None:
    there = Objects("train.checkpoint_dir")
    store.fail = lambda method, path: "500 Internal Server Error" if method == "PUT" and "state.json" in path else None
    with pytest.raises(StorageError):
        folders.upload(there, folder, f"{URL}/checkpoint-3")
    assert "runs/a/checkpoint-3/model.safetensors" in store.stored()
    assert folders.complete(there, URL) == []
    with pytest.raises(DataLossError, match="is not complete"):
        folders.download(there, f"{URL}/checkpoint-3", tmp_path / "again")

    store.fail = lambda method, path: None
    folders.upload(there, folder, f"{URL}/checkpoint-3")
    assert folders.complete(there, URL) == ["checkpoint-3"]
    folders.download(there, f"{URL}/checkpoint-3", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == b"weights" * 1000
    assert [method for method, path in store.requests if path.endswith("COMPLETE.json") and method == "PUT"] == ["PUT"]
    puts = [path for method, path in store.requests if method == "PUT"]
    assert puts[-1].endswith("COMPLETE.json"), "the marker is written last"


def test_trouble_that_passes_is_tried_again(store: Store, folder: Path) -> None:
    failures = iter(["503 Slow Down", "500 Internal Server Error"])
    store.fail = lambda method, path: next(failures, None) if method == "PUT" else None
    folders.upload(Objects("train.checkpoint_dir"), folder, f"{URL}/checkpoint-3")
    assert folders.complete(Objects("k"), URL) == ["checkpoint-3"]


def test_a_damaged_folder_is_told(store: Store, folder: Path, tmp_path: Path) -> None:
    there = Objects("train.checkpoint_dir")
    folders.upload(there, folder, f"{URL}/checkpoint-3")
    store.put("runs/a/checkpoint-3/model.safetensors", b"weighty" * 1000)
    with pytest.raises(DataLossError, match="is not what was uploaded"):
        folders.download(there, f"{URL}/checkpoint-3", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_that_is_being_deleted_is_not_seen(store: Store, folder: Path) -> None:
    there = Objects("train.checkpoint_dir")
    folders.upload(there, folder, f"{URL}/checkpoint-3")
    folders.remove(there, URL, ["checkpoint-3"])
    assert store.stored("runs/a") == []
    folders.upload(there, folder, f"{URL}/checkpoint-3")
    marker, rest = iter([None]), iter(["500 Internal Server Error"] * 99)
    store.fail = lambda method, path: next(marker, next(rest)) if method in {"DELETE", "POST"} else None
    with pytest.raises(StorageError):
        folders.remove(there, URL, ["checkpoint-3"])
    assert folders.complete(there, URL) == []
    assert store.stored("runs/a") != []
