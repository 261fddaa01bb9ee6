"""What an inference replica is started with: its settings and files, and what is said when they are wrong."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import LlamaConfig

from inference_svc.model_files import is_local, read_model
from inference_svc.options import EngineOptions, resolve_options
from inference_svc.plugin import _FailureFile
from inference_svc.settings import InferenceSettings
from inference_svc.vllm_backend.rope import rope_override
from surogate.config.service import parse_settings
from surogate.errors import ConfigError


def test_flags_come_before_the_file(tmp_path: Path) -> None:
    config = tmp_path / "infer.yaml"
    config.write_text("model: m\nmax_num_seqs: 8\nmax_lora_rank: 4\nhost: 0.0.0.0\nport: 8123\n")
    settings = parse_settings(InferenceSettings, ["--config", str(config), "--max-num-seqs", "16", "--seed", "3"])
    options = resolve_options(settings)

    assert (options.model, options.max_num_seqs, options.lora_rank_limit, options.seed) == ("m", 16, 4, 3)
    assert settings.listen == "0.0.0.0:8123"
    given = parse_settings(InferenceSettings, ["--config", str(config), "--listen", "127.0.0.1:0"])
    assert given.listen == "127.0.0.1:0"


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: m\nmax_lora_rnk: 4\n", "max_lora_rnk.*max_lora_rank"), ("max_num_seqs: 4\n", "model: no model is given")],
)
def test_a_wrong_file_is_refused_by_key(text: str, message: str, tmp_path: Path) -> None:
    config = tmp_path / "infer.yaml"
    config.write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve_options(InferenceSettings(config=config))


def test_a_checkpoint_is_known_by_its_headers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"tie_word_embeddings": true}}')
    save_file({"a": np.zeros((2, 3), np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"b": np.zeros(4, np.float16)}, tmp_path / "model-2.safetensors")

    files = read_model(tmp_path)

    assert files.tied
    assert {name: (info.dtype, info.shape) for name, info in files.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (4,)),
    }


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "no config.json"),
        ({"adapter_config.json": "{}"}, "holds an adapter, not a model; merge it"),
        ({"config.json": "{}"}, "no weights"),
        ({"config.json": "[]"}, "no JSON object"),
        ({"config.json": "{"}, "cannot be read"),
        ({"config.json": "{}", "model.safetensors": "short"}, "not a whole safetensors file"),
    ],
)
def test_what_is_no_model_is_named(contents: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"model: .*{message}"):
        read_model(tmp_path)


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    )
    with pytest.raises(ConfigError, match=r"model-2\.safetensors"):
        read_model(tmp_path)


def test_hub_names_are_told_from_folders(tmp_path: Path) -> None:
    assert is_local(str(tmp_path))
    assert is_local("./missing/model")
    assert is_local("missing")
    assert not is_local("Qwen/Qwen3-0.6B")


def test_what_the_engine_failed_with_is_kept_for_its_parent(tmp_path: Path) -> None:
    logger, file = logging.getLogger("test.engine"), tmp_path / "engine" / "failure"
    handler = _FailureFile(file)
    logger.addHandler(handler)
    try:
        file.parent.mkdir()
        for text in ("first", "GPT2LMHeadModel does not support LoRA yet."):
            try:
                raise ValueError(text)
            except ValueError:
                logger.exception("failed to start")
        logger.error("no exception")
        assert file.read_text() == "GPT2LMHeadModel does not support LoRA yet."
        shutil.rmtree(file.parent)
        logger.error("later", exc_info=ValueError("nobody waits for it"))
        assert not file.exists()
    finally:
        logger.removeHandler(handler)


def test_the_front_loads_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, inference_svc.lifespan, inference_svc.__main__\n"
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_model_is_one_line_and_a_failing_exit() -> None:
    command = [sys.executable, "-m", "inference_svc", "--model", "/missing/model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 2
    assert done.stderr == "error: model: /missing/model is not a directory\n"


def test_only_a_name_stretches_rotations_to_the_length_that_is_served() -> None:
    def positions(scaling: object) -> tuple[int, float]:
        config = LlamaConfig(max_position_embeddings=256)
        override = rope_override(EngineOptions("model", max_model_len=1024, rope_scaling=scaling))
        assert override is not None
        override(config)
        return config.max_position_embeddings, config.rope_parameters["factor"]

    assert positions("linear") == (1024, 4.0)
    assert positions({"rope_type": "linear", "factor": 2.0}) == (256, 2.0)
    assert positions({"rope_type": "linear", "max_model_len": 512}) == (512, 2.0)
