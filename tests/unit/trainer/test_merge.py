"""`surogate merge`: the merged model is the adapter's, to rounding; wrong input is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.models.tiny import VOCAB_SIZE, make_tiny_adapter, make_tiny_model
from trainer_svc.worker.commands.merge import main

IDS = torch.arange(48).reshape(2, 24) % VOCAB_SIZE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with a generation config, and an adapter that changes it."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    make_tiny_model(base, std=0.1)
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "do_sample": True, "eos_token_id": 1}))
    make_tiny_adapter(adapter, base)
    return base, adapter


@torch.no_grad()
def logits_of(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()(IDS).logits


def test_the_merged_model_computes_what_the_adapter_does(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    assert main(["--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    expected = logits_of(base, adapter)
    torch.testing.assert_close(logits_of(tmp_path / "merged"), expected, rtol=0, atol=1e-5)
    assert (expected - logits_of(base)).abs().max() > 0.1
    generation = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert generation["temperature"] == 0.7
    template = AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert template and template == AutoTokenizer.from_pretrained(base).chat_template
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_bfloat16_is_the_float32_sum_rounded_once(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    flags = ["--adapter", str(adapter), "--base", str(base)]
    assert main([*flags, "--output", str(tmp_path / "full")]) == 0
    assert main([*flags, "--output", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    full, half = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "half"))
    assert all(torch.equal(value.to(torch.bfloat16), half[name]) for name, value in full.items())
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_wrong_input_is_named(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = folders
    output = tmp_path / "out"

    def refused(*flags: str) -> str:
        assert main([*flags, "--output", str(output)]) == 2
        assert not output.exists()
        return capsys.readouterr().err

    assert "error: --adapter: " in refused("--adapter", str(base))
    assert "has no config.json" in refused("--adapter", str(adapter), "--base", str(adapter))
    other = tmp_path / "other"
    make_tiny_model(other, hidden=32)
    assert "does not fit the base" in refused("--adapter", str(adapter), "--base", str(other))
    lacking = tmp_path / "lacking"
    make_tiny_adapter(lacking, base)
    weights = load_file(lacking / "adapter_model.safetensors")
    dropped = sorted(weights)[0]
    del weights[dropped]
    save_file(weights, lacking / "adapter_model.safetensors")
    assert dropped in refused("--adapter", str(lacking))
    (lacking / "adapter_model.safetensors").write_bytes(b"torn")
    assert "error: --adapter: " in refused("--adapter", str(lacking))
    (lacking / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert "only LORA" in refused("--adapter", str(lacking))


def test_an_adapter_on_a_shared_weight_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model

    base = make_tiny_model(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    flags = ["--adapter", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]
    assert main([*flags, "--output", str(tmp_path / "out")]) == 2
    assert "shares" in capsys.readouterr().err


def test_what_is_there_is_not_overwritten(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["--adapter", str(folders[1]), "--output", str(tmp_path)]) == 2
    assert "--output" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_help_and_wrong_paths_need_no_torch() -> None:
    code = "import sys\nfrom trainer_svc.worker.commands.merge import main\n"
    code += "assert main(['--adapter', '/nowhere', '--output', '/nowhere/x']) == 2\nassert 'torch' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "error: --adapter: /nowhere" in ran.stderr
