"""Adapters as vLLM takes them: joined layers by their parts, and what of a mixture of experts may have one."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference_svc.adapter_checks import check_adapter
from inference_svc.model_files import ModelFiles, TensorInfo
from inference_svc.vllm_backend.fused_adapter import WEIGHTS, fused_layers, split_fused
from surogate.errors import InvalidInputError
from surogate.v1 import common_pb2, weights_pb2

MLP = "base_model.model.model.layers.0.mlp"
CONFIG = '{"r": 2, "lora_alpha": 4}'
GATED = {"gate_up_proj": [("gate_proj", 6), ("up_proj", 6)]}


def test_an_adapter_on_a_joined_layer_is_cut_into_those_of_its_parts(tmp_path: Path) -> None:
    a, b, down = torch.randn(2, 4), torch.randn(12, 2), torch.randn(2, 6)
    image = tmp_path / "image"
    given = {f"{MLP}.gate_up_proj.lora_A.weight": a, f"{MLP}.gate_up_proj.lora_B.weight": b}
    save_file({**given, f"{MLP}.down_proj.lora_A.weight": down}, image)
    os.link(image, tmp_path / WEIGHTS)
    split_fused(tmp_path, GATED)

    found, x = load_file(tmp_path / WEIGHTS), torch.randn(4)
    parts = [
        found[f"{MLP}.{part}.lora_B.weight"] @ (found[f"{MLP}.{part}.lora_A.weight"] @ x)
        for part, _ in GATED["gate_up_proj"]
    ]
    torch.testing.assert_close(torch.cat(parts), b @ (a @ x))
    assert torch.equal(found.pop(f"{MLP}.down_proj.lora_A.weight"), down) and len(found) == 4
    assert f"{MLP}.gate_up_proj.lora_A.weight" in load_file(image), "what was pushed stays as it is"


def test_an_adapter_without_joined_layers_is_left_alone(tmp_path: Path) -> None:
    save_file({f"{MLP}.down_proj.lora_A.weight": torch.randn(2, 6)}, tmp_path / WEIGHTS)
    before = (tmp_path / WEIGHTS).stat().st_ino
    split_fused(tmp_path, GATED)
    assert (tmp_path / WEIGHTS).stat().st_ino == before


def test_joined_layers_are_those_that_vllm_has_several_names_for() -> None:
    layers = {"m.0.gate_up_proj": (6, 6), "m.0.qkv_proj": (8, 4, 4), "m.0.o_proj": None, "m.0.dense": (6, 6)}
    modules = {
        name: SimpleNamespace(**({} if sizes is None else {"output_slices": sizes})) for name, sizes in layers.items()
    }
    packed = {"gate_up_proj": ["gate_proj", "up_proj"], "qkv_proj": ["q", "k", "v"], "dense": ["dense"]}
    manager = SimpleNamespace(modules=modules, packed_modules_mapping=packed)
    assert fused_layers(manager) == {**GATED, "qkv_proj": [("q", 8), ("k", 4), ("v", 4)]}


def test_layers_of_a_mixture_that_may_have_adapters(tmp_path: Path) -> None:
    shapes = {
        "model.embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4), "model.norm.weight": (4,),
        "model.layers.0.self_attn.q_proj.weight": (4, 4), "model.layers.0.mlp.gate.weight": (2, 4),
        "model.layers.0.mlp.experts.0.gate_proj.weight": (4, 4), "model.layers.1.mlp.down_proj.weight": (4, 4),
    }  # fmt: skip
    tensors = {name: TensorInfo("F32", shape, tmp_path) for name, shape in shapes.items()}
    files = ModelFiles(tmp_path, {}, tensors)
    assert files.has_experts and files.linear_names == ["down_proj", "q_proj"]


@pytest.mark.parametrize("stored", ["model.language_model.", "language_model.model.", "model."])
def test_the_language_model_of_one_that_sees_is_found_by_all_of_its_names(stored: str, tmp_path: Path) -> None:
    files = ModelFiles(tmp_path, {}, {f"{stored}layers.0.q_proj.weight": TensorInfo("F32", (6, 4), tmp_path)})
    manifest = weights_pb2.WeightManifest(kind=weights_pb2.WEIGHT_KIND_LORA, adapter_config_json=CONFIG)
    name = "base_model.model.model.language_model.layers.0.q_proj.lora_{}.weight"
    for side, shape in (("A", [2, 4]), ("B", [6, 2])):
        manifest.tensors.add(name=name.format(side), shape=shape, dtype=common_pb2.DTYPE_F32)
    check_adapter(manifest, files, max_rank=8)
    manifest.tensors[0].name = manifest.tensors[0].name.replace("language_model", "vision_tower")
    with pytest.raises(InvalidInputError, match=r"the model has no linear layer model\.vision_tower"):
        check_adapter(manifest, files, max_rank=8)
