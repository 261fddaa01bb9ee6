"""`rope_scaling` and `max_model_len`: what they make of a model's configuration, and what they cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surogate.config.train import TrainConfig
from surogate.errors import ConfigError
from tests.helpers.models.architectures import LLAMA3_ROPE, SIZES
from trainer_svc.worker.model.rope import apply_context


def config_of(kind: str, **more: Any) -> Any:
    return getattr(transformers, f"{kind}Config")(**{**SIZES, **more})


def applied(config: Any, **keys: Any) -> Any:
    apply_context(config, TrainConfig.model_validate({"model": "m", **keys}))
    return config


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3"])
def test_a_name_stretches_from_the_models_context_to_the_one_asked_for(name: str) -> None:
    config = applied(config_of("Llama"), rope_scaling=name, max_model_len=1024)
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == (name, 4.0)
    assert config.rope_parameters.get("original_max_position_embeddings", 256) == 256
    assert config.max_position_embeddings == 1024


def test_dynamic_scaling_is_measured_from_the_context_that_the_model_had(tmp_path: Path) -> None:
    config = applied(config_of("Llama"), rope_scaling="dynamic", max_model_len=1024)
    assert (config.max_position_embeddings, config.rope_parameters["factor"]) == (256, 4.0)
    scaled = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    plain = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config_of("Llama"))
    ids = torch.arange(1000)[None]
    x = torch.zeros(1, 1000, 32)
    assert not scaled(x, ids)[0].equal(plain(x, ids)[0])
    assert scaled(x[:, :200], ids[:, :200])[0].equal(plain(x[:, :200], ids[:, :200])[0])


def test_layers_with_a_window_keep_their_rotations() -> None:
    config = config_of("Gemma3Text", sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    before = dict(config.rope_parameters["sliding_attention"])
    applied(config, rope_scaling="linear", max_model_len=2048)
    assert config.rope_parameters["full_attention"]["rope_type"] == "linear"
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    assert config.rope_parameters["sliding_attention"] == before
    assert set(config.rope_parameters) == {"full_attention", "sliding_attention"}


def test_another_type_of_scaling_leaves_nothing_of_the_models_own() -> None:
    config = applied(config_of("Llama", rope_parameters=LLAMA3_ROPE), rope_scaling={"type": "linear", "factor": 2})
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2, "rope_theta": 10000.0}
    config = applied(config_of("Llama", rope_parameters=LLAMA3_ROPE), rope_scaling={"rope_type": "llama3", "factor": 2})
    assert config.rope_parameters == {**LLAMA3_ROPE, "factor": 2}


def test_factors_of_each_dimension_stand_as_they_are_given() -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    config = applied(config_of("Llama"), rope_scaling=scaling, max_model_len=1024)
    assert config.max_position_embeddings == 1024
    assert config.rope_parameters["long_factor"] == [4.0] * 16
    assert config.rope_parameters["original_max_position_embeddings"] == 256


GPT2 = {"n_positions": 256}


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        (
            "Llama",
            {"rope_scaling": {"rope_type": "foo"}},
            "rope_scaling: has the rope_type 'foo'; known are dynamic",
        ),
        ("Llama", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: cannot be applied: .*yarn.*factor"),
        (
            "Llama",
            {"rope_scaling": {"rope_type": "linear", "factor": "x"}},
            "rope_scaling: has the factor 'x'; it must",
        ),
        (
            "Llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2, "max_model_len": "x"}},
            "rope_scaling: has the max_model_len 'x'; it must",
        ),
        (
            "Llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
            "rope_scaling: has the factor 0.5; it must",
        ),
        ("Llama", {"rope_scaling": "longrope", "max_model_len": 512}, "rope_scaling: cannot be applied: .*long_factor"),
        ("Llama", {"rope_scaling": "linear", "max_model_len": 64}, "max_model_len: is 64, less than the 256 tokens"),
        ("GPT2", {"rope_scaling": "linear", "max_model_len": 512}, "rope_scaling: is set, and a gpt2 has no rotary"),
        (
            "GPT2",
            {"max_model_len": 512, "sequence_len": 512},
            "max_model_len: is 512, and this gpt2 has learnt 256 posi",
        ),
        ("Llama", {"sequence_len": 257}, "sequence_len: 257 exceeds the model's context of 256 tokens"),
    ],
)
def test_what_cannot_be_applied_names_its_key(kind: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^train.{said}"):
        applied(config_of(kind, **(GPT2 if kind == "GPT2" else {})), **{"sequence_len": 128, **keys})
