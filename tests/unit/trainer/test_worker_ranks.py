"""Several processes train what one trains: losses, norms, metrics; full and LoRA, SFT and GRPO, at every ZeRO level."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.models.tiny import make_tiny_model
from trainer_svc.rank_plan import RankPlan

COMMON: dict[str, Any] = {
    "torch_dtype": "float32", "optimizer": "adamw", "learning_rate": 1e-3, "sequence_len": 64, "max_steps": 5,
    "recompute": False, "per_device_train_batch_size": 1, "logging_steps": 1, "eval_steps": 100, "lora_dropout": 0.0,
    "lora_rank": 4, "max_grad_norm": 0.5,
}  # fmt: skip
LEVELS = (1, 2, 3)


def cases(model: Path, data: Path, levels: tuple[int, ...], changes: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for kind in ("sft", "grpo"):
        for lora in (True, False):
            for level in levels:
                train = {**COMMON, "model": str(model), "lora": lora, "zero_level": level, **changes}
                if kind == "sft":
                    train["datasets"] = [{"path": str(data), "type": "conversation"}]
                elif lora:
                    train["loss"] = {"type": "grpo", "beta": 0.1}
                name = f"{kind}-{'lora' if lora else 'full'}-{level}"
                found.append({"name": name, "kind": kind, "train": train})
    return found


def run(folder: Path, ranks: int, wanted: list[dict[str, Any]]) -> dict[str, Any]:
    """Trains the cases on so many gloo processes; what rank 0 found."""
    (folder / "cases.json").write_text(json.dumps(wanted))
    environments = RankPlan(ranks).environments()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.trainer.rank_program", str(folder)],
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        for environment in environments
    ]
    try:
        codes = [process.wait(timeout=280) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks
    return json.loads((folder / f"results-{ranks}.json").read_text())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model", std=0.1)
    rows = [
        {"messages": [{"role": "user", "content": f"{n} plus {n}?"}, {"role": "assistant", "content": str(2 * n) * 3}]}
        for n in range(60)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "model", folder / "data.jsonl"


@pytest.fixture(scope="module")
def alone(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    return run(tmp_path_factory.mktemp("alone"), 1, cases(*inputs, (1,), {}))


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, result in found.items():
        reference = expected[name.rsplit("-", 1)[0] + "-1"]
        for key in ("losses", "norms", "evaluations"):
            # A GRPO loss is what is left of terms that nearly cancel: its rounding is on the scale of its curve.
            scale = max(map(abs, reference[key]), default=0.0)
            assert result[key] == pytest.approx(reference[key], rel=1e-5, abs=1e-5 * scale), (name, key)
        for key, value in reference["metrics"].items():
            assert result["metrics"][key] == (pytest.approx(value, rel=1e-5) if value is not None else None), name
        assert result["logprobs"][0] == pytest.approx(reference["logprobs"][0], rel=1e-4), name
        assert result["exported"] == reference["exported"]


@pytest.mark.slow
def test_four_processes_find_what_one_does(inputs: tuple[Path, Path], alone: dict[str, Any], tmp_path: Path) -> None:
    check(run(tmp_path, 4, cases(*inputs, LEVELS, {})), alone)


@pytest.mark.slow
def test_two_processes_find_what_one_does_and_checkpoints_go_from_any_number_to_any(
    inputs: tuple[Path, Path], alone: dict[str, Any], tmp_path: Path
) -> None:
    found = run(tmp_path, 2, cases(*inputs, LEVELS, {"save_steps": 2, "save_total_limit": 9}))
    check(found, alone)
    full = load_file(Path(found["sft-full-3"]["output"]) / "model.safetensors")
    whole = load_file(Path(alone["sft-full-1"]["output"]) / "model.safetensors")
    assert {name: value.shape for name, value in full.items()} == {name: value.shape for name, value in whole.items()}

    # The second half of each run, from the checkpoints of two processes: by one, and by two at another level.
    resumed = []
    for case in cases(*inputs, LEVELS, {}):
        if case["kind"] == "sft":
            output = Path(found[case["name"]]["output"])
            resumed.append({**case, "resume_from": str(output / "checkpoint-2")})
    onward = {1: resumed, 2: [{**case, "train": {**case["train"], "zero_level": 3}} for case in resumed]}
    for ranks, wanted in onward.items():
        for name, result in run(tmp_path, ranks, wanted).items():
            reference = alone[name.rsplit("-", 1)[0] + "-1"]
            assert result["losses"] == pytest.approx(reference["losses"][2:], rel=1e-5), (ranks, name)
            assert result["norms"] == pytest.approx(reference["norms"][2:], rel=1e-5), (ranks, name)


OTHERS: dict[str, dict[str, Any]] = {
    "adamw_8bit-full": {"optimizer": "adamw_8bit", "lora": False},
    "adamw_8bit-lora": {"optimizer": "adamw_8bit", "lora_rank": 64},
    "normuon-full": {"optimizer": "normuon", "lora": False},
    "normuon-qlora_bnb": {"optimizer": "normuon", "qlora_bnb": True, "qlora_bnb_double_quant": False},
    "adamw-qlora_fp8": {"qlora_fp8": True, "merge_adapter": True},
    "adamw_8bit-qlora_fp4": {"optimizer": "adamw_8bit", "lora_rank": 64, "qlora_fp4": True},
}
"""Other optimisers and storages. The adapters of rank 64 are large enough for moments of 8 bits."""

IN_GRPO = ("normuon-full", "adamw_8bit-qlora_fp4")


def others(inputs: tuple[Path, Path], levels: tuple[int, ...], **changes: Any) -> list[dict[str, Any]]:
    model, data = inputs
    common = {**COMMON, "model": str(model), **changes}
    sft = {"datasets": [{"path": str(data), "type": "conversation"}]}
    found = []
    for name, keys in OTHERS.items():
        for kind in ("sft", "grpo"):
            if kind == "sft" or name in IN_GRPO:
                train = {**common, **keys, **(sft if kind == "sft" else {})}
                found += [
                    {"name": f"{kind}-{name}-{level}", "kind": kind, "train": {**train, "zero_level": level}}
                    for level in levels
                ]
    return found


def same_curve(found: dict[str, Any], expected: dict[str, Any], name: str, start: int = 0) -> None:
    # Moments in 8 bits: a last bit of a gradient can move a moment to the next of 256 values.
    tolerance = 2e-3 if "adamw_8bit" in name else 1e-5
    for key in ("losses", "norms", "evaluations"):
        curve = expected[key] if key == "evaluations" else expected[key][start:]
        scale = max(map(abs, expected[key]), default=0.0)
        assert found[key] == pytest.approx(curve, rel=tolerance, abs=tolerance * scale), (name, key)
    assert found["base"] == expected["base"], name


@pytest.fixture(scope="module")
def others_alone(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("others"), 1, others(inputs, (1,)))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_with_other_optimisers_and_quantised_bases_find_what_one_does(
    inputs: tuple[Path, Path], others_alone: dict[str, Any], tmp_path: Path
) -> None:
    found = run(tmp_path, 2, others(inputs, LEVELS, save_steps=2, save_total_limit=9))
    for name, result in found.items():
        same_curve(result, others_alone[name[:-1] + "1"], name)
    merged = [
        load_file(Path(results["sft-adamw-qlora_fp8-" + level]["output"]) / "merged" / "model.safetensors")
        for results, level in ((others_alone, "1"), (found, "2"), (found, "3"))
    ]
    for other in merged[1:]:
        torch.testing.assert_close(other, merged[0], rtol=1e-3, atol=1e-5)

    # The rest of each run from the checkpoints of two processes: by two at the next level, and by one.
    resumed = [
        {**case, "resume_from": str(Path(found[case["name"]]["output"]) / "checkpoint-2")}
        for case in others(inputs, LEVELS)
        if case["kind"] == "sft"
    ]
    for case in resumed:
        case["train"] = {**case["train"], "zero_level": case["train"]["zero_level"] % 3 + 1}
    for ranks in (2, 1):
        for name, result in run(tmp_path, ranks, resumed).items():
            same_curve(result, others_alone[name[:-1] + "1"], name, start=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_processes_with_other_optimisers_and_quantised_bases_find_what_one_does(
    inputs: tuple[Path, Path], others_alone: dict[str, Any], tmp_path: Path
) -> None:
    for name, result in run(tmp_path, 4, others(inputs, (2, 3))).items():
        same_curve(result, others_alone[name[:-1] + "1"], name)


def emulated(inputs: tuple[Path, Path], folder: Path, recipe: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one process finds with products of a recipe and with bfloat16; and what two find, at each level."""
    make_tiny_model(folder / "model", std=0.1, dtype="bfloat16")
    data = [{"path": str(inputs[1]), "type": "conversation"}]
    common = {**COMMON, "model": str(folder / "model"), "datasets": data, "torch_dtype": "bfloat16"}

    def wanted(levels: tuple[int, ...], recipe: str) -> list[dict[str, Any]]:
        keys = {**common, "recipe": recipe, "recompute": True}
        return [
            {"name": f"{lora}-{recipe}-{level}", "kind": "sft", "train": {**keys, "lora": lora, "zero_level": level}}
            for lora in (True, False)
            for level in levels
        ]

    alone = run(folder, 1, [*wanted((1,), recipe), *wanted((1,), "bf16")])
    assert alone[f"False-{recipe}-1"]["losses"] != alone["False-bf16-1"]["losses"]
    return alone, run(folder, 2, wanted(LEVELS, recipe))


@pytest.mark.slow
def test_two_processes_with_fp8_products_find_what_one_does(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Emulated on the CPU. A last bit can move a value to the next of E4M3."""
    alone, both = emulated(inputs, tmp_path, "fp8_hybrid")
    for name, result in both.items():
        for key in ("losses", "norms"):
            assert result[key] == pytest.approx(alone[name[:-1] + "1"][key], rel=1e-3), (name, key)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_with_nvfp4_products_find_the_same_at_every_level(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Emulated on the CPU. Gradients are rounded at random, and two ranks draw other numbers than one."""
    alone, both = emulated(inputs, tmp_path, "nvfp4")
    for name, result in both.items():
        one, first = alone[name[:-1] + "1"], both[name[:-1] + "1"]
        assert result["losses"][0] == pytest.approx(one["losses"][0], rel=1e-5), name  # before any gradient
        for key, near, same in (("losses", 0.05, 2e-3), ("norms", 0.25, 1e-2)):
            assert result[key] == pytest.approx(one[key], rel=near), (name, key)
            assert result[key] == pytest.approx(first[key], rel=same), (name, key)


@pytest.mark.slow
def test_merged_weights_of_two_processes_are_those_of_one(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    train = {**COMMON, "model": str(inputs[0]), "lora": True, "max_steps": 2}
    wanted = [
        {
            "name": f"{name}-{level}", "kind": "grpo", "merge_pushes": True,
            "train": {**train, "zero_level": level, **more},
        }
        for name, more in (("plain", {}), ("quantised", {"qlora_bnb": True}))
        for level in LEVELS
    ]  # fmt: skip
    alone = run(tmp_path, 1, [case for case in wanted if case["name"].endswith("-1")])
    for name, result in run(tmp_path, 2, wanted).items():
        expected = load_file(Path(alone[f"{name[:-2]}-1"]["output"]) / "weights-1.safetensors")
        found = load_file(Path(result["output"]) / "weights-1.safetensors")
        assert found.keys() == expected.keys() and not any("lora" in weight for weight in found)
        for weight, value in found.items():
            torch.testing.assert_close(value, expected[weight], rtol=1e-4, atol=1e-6)
