"""Where rows come from: files, folders and their splits, saved datasets, repositories as the hub has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import TypeAdapter

from surogate.config.data import Dataset
from surogate.errors import ConfigError
from trainer_svc.worker.data.rows import find

CARD = """---
configs:
- config_name: short
  data_files:
  - {split: train, path: short/a.jsonl}
  - {split: test, path: short/b.jsonl}
- config_name: long
  data_files: long.jsonl
---
A repository as the hub has them.
"""


def entry(path: Path | str, **keys: Any) -> Dataset:
    return TypeAdapter(Dataset).validate_python({"path": str(path), "type": "text", **keys})


def read(path: Path | str, **keys: Any) -> list[str]:
    return [row["text"] for row in find(entry(path, **keys), "train.datasets.0").read()]


def refusal(path: Path | str, **keys: Any) -> tuple[str, str]:
    with pytest.raises(ConfigError) as error:
        read(path, **keys)
    (found,) = error.value.violations
    return found.field.removeprefix("train.datasets.0."), found.description


def write(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of three splits, named in as many ways."""
    write(tmp_path / "train-00000-of-00002.jsonl", ["t0"])
    write(tmp_path / "train-00001-of-00002.jsonl", ["t1"])
    write(tmp_path / "dev.jsonl", ["v"])
    write(tmp_path / "test" / "part.jsonl", ["e"])
    return tmp_path


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", ["t0", "t1"]), ("validation", ["v"]), ("dev", ["v"]), ("test", ["e"]), ("train[:1]", ["t0"])],
)
def test_splits_of_a_folder_are_told_by_names(folder: Path, split: str, expected: list[str]) -> None:
    assert read(folder, split=split) == expected


def test_a_split_that_is_not_there_is_not_replaced_by_all_files(tmp_path: Path) -> None:
    write(tmp_path / "data-1.jsonl", ["a"])
    assert refusal(tmp_path, split="validation") == (
        "split",
        f"no file in {tmp_path} is named after the split `validation`; there are data-1.jsonl",
    )


def test_files_that_name_no_split_are_training_data(tmp_path: Path) -> None:
    write(tmp_path / "data-1.jsonl", ["a"])
    write(tmp_path / "test.jsonl", ["held out"])
    assert read(tmp_path) == ["a"]


def test_a_split_of_ones_own_name(tmp_path: Path) -> None:
    write(tmp_path / "fold1.jsonl", ["a"])
    write(tmp_path / "fold2.jsonl", ["b"])
    assert read(tmp_path, split="fold2") == ["b"]


def test_a_file_has_one_split_and_may_be_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "b", "c", "d"])
    assert read(path, split="train[:50%]") == ["a", "b"]
    assert refusal(path, split="test") == ("split", f"is test, and {path} is one file; leave it out")
    assert refusal(path, split="train[oops]")[0] == "split"


def test_subset_is_a_folder_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "en" / "train.jsonl", ["hello"])
    write(tmp_path / "fr" / "train.jsonl", ["bonjour"])
    assert read(tmp_path, subset="fr") == ["bonjour"]
    assert refusal(tmp_path, subset="de") == ("subset", f"there is no folder `de` in {tmp_path}; there are en, fr")


def test_subset_of_a_file_means_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a"])
    assert refusal(path, subset="x") == ("subset", f"is x, and {path} is a file; leave it out")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder laid out as a dataset on the hub, with two configurations."""
    write(tmp_path / "short" / "a.jsonl", ["a", "b"])
    write(tmp_path / "short" / "b.jsonl", ["c"])
    write(tmp_path / "long.jsonl", ["d" * 100])
    (tmp_path / "README.md").write_text(CARD)
    return tmp_path


def test_a_repository_has_subsets_and_splits(repository: Path) -> None:
    assert read(repository, subset="short") == ["a", "b"]
    assert read(repository, subset="short", split="test") == ["c"]
    assert read(repository, subset="long") == ["d" * 100]


def test_a_repository_says_what_it_has(repository: Path) -> None:
    field, said = refusal(repository, subset="none")
    assert (field, "short" in said, "long" in said) == ("subset", True, True)
    assert refusal(repository)[0] == "subset"
    field, said = refusal(repository, subset="short", split="dev")
    assert (field, "train" in said) == ("split", True)


def test_samples_are_the_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "b", "c"])
    assert read(path, samples=2) == ["a", "b"]
    assert read(path, samples=5) == ["a", "b", "c"]


def test_identity_follows_the_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a"])
    before = find(entry(path), "k").identity
    assert find(entry(path), "k").identity == before
    write(path, ["ab"])
    assert find(entry(path), "k").identity != before


def test_a_name_that_is_no_file_is_asked_for_at_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real library, with a hub that is a folder of repositories."""
    write(tmp_path / "owner" / "name" / "train.jsonl", ["a", "b"])
    write(tmp_path / "owner" / "name" / "test.jsonl", ["c"])
    load = datasets.load_dataset

    def from_folder(repository: str, **options: Any) -> Any:
        if not (tmp_path / repository).exists():
            raise ConnectionError(f"Couldn't reach '{repository}' on the Hub")
        return load(str(tmp_path / repository), **options)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    assert read("owner/name") == ["a", "b"]
    assert read("owner/name", split="test") == ["c"]
    assert find(entry("owner/name"), "k").identity == find(entry("owner/name"), "k").identity
    field, said = refusal("owner/name", split="dev")
    assert (field, "test" in said) == ("split", True)
    assert refusal("owner/nothing")[0] == "path"


@pytest.mark.parametrize(
    "text", ["text,b\nhello,2,\nyou,3,\n", "text,b\nhello,2,3,4\nyou,5,6,7\n"], ids=["comma", "fields"]
)
def test_fields_without_a_header_do_not_move_the_others(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.csv").write_text(text)
    assert read(tmp_path / "data.csv") == ["hello", "you"]


def test_half_of_a_surrogate_pair_is_told_by_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", ["a"])
    file.write_text(file.read_text() + '{"text": "\\ud83d"}\n')
    assert refusal(file) == (
        "path",
        f"{file} could not be read: {file}:2: has half of a surrogate pair (\\ud83d), which is no character",
    )


@pytest.mark.parametrize("split", ["train[5:2]", "train[:500%]", "train[:0]"])
def test_a_slice_that_holds_nothing_is_the_splits_fault(tmp_path: Path, split: str) -> None:
    assert refusal(write(tmp_path / "data.jsonl", ["a"] * 9), split=split)[0] == "split"
