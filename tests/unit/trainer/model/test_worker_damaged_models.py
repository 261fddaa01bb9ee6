"""Models' folders with something wrong in them: the file is named, and nothing in a folder is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surogate.config.train import TrainConfig
from surogate.errors import ConfigError
from tests.helpers.models.engine import open_engine
from tests.helpers.models.tiny import make_tiny_model
from trainer_svc.worker.data.tokenizer import load_tokenizer
from trainer_svc.worker.model.modeling import load_model

SHARD, OTHER = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
RAN = "ran"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def shard_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / SHARD)
    names = list(load_file(folder / SHARD))
    places = {name: SHARD if i % 2 else OTHER for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def index_broken(folder: Path) -> None:
    shard_missing(folder)
    (folder / "model.safetensors.index.json").write_text("{ not json")


def link_broken(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/0123")


def not_torch(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"hello")


def config_broken(folder: Path) -> None:
    (folder / "config.json").write_text("{ not json")


def config_wrong(folder: Path) -> None:
    edit(folder / "config.json", hidden_size="many")


def heads_wrong(folder: Path) -> None:
    edit(folder / "config.json", num_attention_heads=0)


def tokenizer_broken(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{ not json")


def weights_not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def own_code(folder: Path) -> None:
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text(f"open({str(folder / RAN)!r}, 'w')\n")


class Runs:
    """What unpickling would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def bin_with_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Runs(folder / RAN)}, folder / "pytorch_model.bin")


CASES = [
    (cut, r"model\.safetensors is damaged \(.*\); download the model again"),
    (pointer, r"model\.safetensors is a pointer of Git LFS .*: run `git lfs pull`"),
    (empty, r"model\.safetensors is empty"),
    (shard_missing, rf"model\.safetensors\.index\.json names {OTHER}, which is not there"),
    (index_broken, r"model\.safetensors\.index\.json is not JSON: "),
    (link_broken, r"model\.safetensors is a link to \.\./blobs/0123, which is not there"),
    (not_torch, r"pytorch_model\.bin is not a file of torch\.save"),
    (config_broken, r"config\.json is not JSON: "),
    (config_wrong, r"'hidden_size'"),
    (heads_wrong, r"could not load .* from the folder: "),
    (tokenizer_broken, r"tokenizer_config\.json is not JSON: "),
    (weights_not_finite, r"has weights that are not finite \(model\.norm\.weight\)"),
    (own_code, r"needs code of its own \(auto_map\), which is not run here"),
    (bin_with_code, r"more in it than weights, which could run code"),
]


@pytest.mark.parametrize(("spoil", "said"), CASES, ids=[spoil.__name__ for spoil, _ in CASES])
def test_what_is_wrong_with_a_folder_is_said(folder: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(folder)
    train = TrainConfig.model_validate(
        {"model": str(folder), "torch_dtype": "float32", "lora": False, "sequence_len": 64}
    )
    with pytest.raises(ConfigError, match=rf"train\.model: .*{said}"):
        load_tokenizer(train)
        load_model(train)
    assert not (folder / RAN).exists()


@pytest.mark.parametrize("spoil", [cut, shard_missing])
def test_it_is_said_of_bases_that_are_quantised_too(folder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(folder)
    train = TrainConfig.model_validate(
        {"model": str(folder), "torch_dtype": "float32", "qlora_bnb": True, "sequence_len": 64}
    )
    with pytest.raises(ConfigError, match=r"\.safetensors.* (is damaged|is not there)"):
        load_model(train)


def test_weights_that_are_written_may_be_read_by_whom_other_files_may(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "some words to learn"}) + "\n")
    keys = {"datasets": [{"path": str(data), "type": "text"}], "lora": False, "max_steps": 1}
    engine, _ = open_engine("pt", tmp_path / "out", {"model": str(folder), "sequence_len": 64, **keys})
    engine.run()
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}
