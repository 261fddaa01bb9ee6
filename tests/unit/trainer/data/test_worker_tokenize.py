"""`surogate tokenize`: figures, tokens beside labels, and the cache that the training run finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.models.tiny import make_tiny_model
from trainer_svc.worker.commands.tokenize import main

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUROGATE_CACHE_DIR", str(tmp_path / "cache"))
    make_tiny_model(tmp_path / "model", layers=1, hidden=32)
    rows = [json.dumps({"messages": CHAT}) for _ in range(10)]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    path = tmp_path / "train.yaml"
    path.write_text(
        f"model: {tmp_path}/model\noptimizer: adamw\nsequence_len: 128\nvalidation_split_ratio: 0.2\n"
        f"datasets:\n  - path: {tmp_path}/chats.jsonl\n    type: conversation\n"
    )
    return path


def test_it_says_what_there_is(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config)]) == 0
    head, row, total, held, where = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["dataset", "type", "rows"]
    tokens = len("<user\nhi>\n<assistant\nyo>\n")
    assert row.split()[1:] == ["conversation", "10", "2", "0", "0", "8", str(8 * tokens), "12.0", "%", str(tokens)]
    assert f"{8 * tokens} tokens in sequences of 128, packed" in total
    assert "steps an epoch" in total
    assert held == f"held out: 2 samples, {2 * tokens} tokens"
    assert where.startswith("tokenized in")
    assert main([str(config)]) == 0
    assert "found in the cache" in capsys.readouterr().out


def test_debug_shows_tokens_beside_labels(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config), "--debug", "--samples", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tokens = lines[lines.index("sample 0") + 2 :]
    learnt = [line.split() for line in tokens if "*" in line]
    assert [fields[-1] for fields in learnt] == ["'y'", "'o'", "'<|im_end|>'"]
    assert all(token == label for _, token, label, *_ in learnt)
    assert all(line.split()[2] == "-100" for line in tokens if "*" not in line)


def test_a_wrong_key_is_named_with_its_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(config.read_text().replace("type: conversation", "type: chats"))
    assert main([str(config)]) == 2
    assert "datasets.0" in capsys.readouterr().err
    assert main([str(config), "--set", "datasets.0.type=conversation", "--set", "datasets.0.messages_field=x"]) == 2
    assert "train.datasets.0.messages_field: there is no column `x`" in capsys.readouterr().err


def test_as_a_command(config: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "surogate.cli.main", "tokenize", str(config)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tokenized in" in done.stdout
