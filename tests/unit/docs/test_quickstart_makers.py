"""What the quickstart makes: a tokenizer and a model that others load, demonstrations, the record, the summary."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from surogate.reward.base import Split

ROOT = Path(__file__).parents[3]
ORCH = ROOT / "examples" / "grpo" / "orch.yaml"
CHAT = [{"role": "user", "content": "straße"}, {"role": "assistant", "content": "eßarts"}]


@pytest.fixture(scope="module")
def quickstart() -> Iterator[Any]:
    """Imports a file of examples/quickstart by name, as they import each other."""
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    yield import_module
    sys.path.pop(0)


def test_the_model_is_one_that_transformers_makes(quickstart: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

    parameters = quickstart("model").make_model(tmp_path, layers=2, hidden=64)
    model = Qwen3ForCausalLM(AutoConfig.from_pretrained(tmp_path))
    assert model.num_parameters() == parameters
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (model.config.eos_token_id, model.config.pad_token_id)
    ids = tokenizer.encode("straße <|end|>", add_special_tokens=False)
    assert ids[-1] == tokenizer.eos_token_id and len(ids) == len("straße ".encode()) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "straße "


def test_fine_tuning_learns_the_answer_and_its_end(quickstart: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    quickstart("model").make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, mask in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(learned) == "eßarts<|end|>"
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=False)
    assert prompt == "<|user|>straße<|end|><|assistant|>"


def test_demonstrations_are_right_and_none_is_held_out(quickstart: Any, tmp_path: Path) -> None:
    from reward_svc.environments.reverse_text import ReverseText

    data = quickstart("data")
    assert data.write_demonstrations(tmp_path / "rows.jsonl", ORCH, count=300, seed=3) == 300
    rows = [json.loads(line)["messages"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(answer["content"] == prompt["content"][::-1] for prompt, answer in rows)
    environment = ReverseText()
    held_out = environment.examples(environment.parse({"eval_examples": 500}), Split.EVAL, 42)
    assert not {prompt["content"] for prompt, _ in rows} & {example.prompt[-1].content for example in held_out}


def test_documentation_is_prose_of_this_python(quickstart: Any, tmp_path: Path) -> None:
    data = quickstart("data")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "good.py").write_text(f'"""{"Says what it is for. " * 5}"""\ndef f():\n    """Short."""\n')
    (tmp_path / "lib" / "broken.py").write_text("def (:\n")
    assert list(data.documentation(tmp_path / "lib")) == [("Says what it is for. " * 5).strip()]
    written = data.write_documentation(tmp_path / "a.jsonl", characters=20_000, seed=1)
    data.write_documentation(tmp_path / "b.jsonl", characters=20_000, seed=1)
    assert written >= 20_000
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_an_interrupted_run_goes_on_and_another_starts_over(quickstart: Any, tmp_path: Path) -> None:
    progress = quickstart("progress")
    phases = ("begin", "make", "pt")
    first = progress.open_progress(tmp_path, "a", phases)
    with first.phase("make"):
        (tmp_path / "base").mkdir()
    with pytest.raises(KeyboardInterrupt), first.phase("pt"):
        raise KeyboardInterrupt
    (tmp_path / "notes.txt").write_text("the user's own")
    again = progress.open_progress(tmp_path, "a", phases)
    assert again.done("make") and not again.done("pt") and (tmp_path / "base").exists()
    with again.phase("pt"):
        pass
    assert not progress.open_progress(tmp_path, "a", phases).done("make"), "a finished run starts over"
    assert not (tmp_path / "base").exists() and (tmp_path / "notes.txt").exists()


def test_a_folder_of_somebody_else_is_left_alone(quickstart: Any, tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    with pytest.raises(FileExistsError, match="remove it, or name another"):
        quickstart("progress").open_progress(tmp_path, "a", ("begin",))
    assert (tmp_path / "sft").exists()


def test_with_the_default_folder_and_seed_the_commands_are_the_files(quickstart: Any) -> None:
    run = quickstart("run")
    commands = run.commands(run.DEFAULT_OUTPUT, run.DEFAULT_SEED, None)
    assert not any("--set" in argument for command in commands.values() for argument in command)
    assert commands["pt"] == ["pt", "examples/pt/tiny.yaml"]


def test_another_folder_and_seed_reach_every_file(quickstart: Any, tmp_path: Path) -> None:
    from surogate.client.jobs import job_documents

    run = quickstart("run")
    for phase, (_, *command) in run.commands(tmp_path, 7, 3).items():
        overrides = [item.removeprefix("--set=") for item in command if item.startswith("--set=")]
        parts = ("train", "infer", "orch") if phase == "grpo" else ("train",)
        names = {"pt": "pt/tiny", "sft": "sft/tiny"}
        files = {part: ROOT / "examples" / f"{names.get(phase, f'grpo/{part}')}.yaml" for part in parts}
        text = json.dumps({part: found.data for part, found in job_documents(phase, files, overrides).items()})
        assert str(tmp_path) in text and "outputs/quickstart" not in text
        assert '"train_seed": 7' in text and '"max_steps": 3' in text


def test_a_command_that_fails_is_named(quickstart: Any, tmp_path: Path, capfd: Any) -> None:
    shell = quickstart("shell")
    with pytest.raises(shell.CommandFailedError, match=r"exit code 2: surogate pt .*gone\.yaml"):
        shell.surogate("pt", str(tmp_path / "gone.yaml"))
    assert "gone.yaml" in capfd.readouterr().err


def test_the_summary_has_the_numbers_of_the_run(quickstart: Any, tmp_path: Path, capsys: Any) -> None:
    grpo = tmp_path / "grpo"
    grpo.mkdir()
    steps = [{"step": n, "time/step": 1.0, "time/train": 0.5, "time/push": 0.02, "push/bytes": 100} for n in (1, 2)]
    evaluations = [{"step": n, "reward/mean": reward, "num_prompts": 9} for n, reward in ((0, 0.5), (2, 0.75))]
    samples = [
        {"step": n, "prompt": "a|b", "answer": "b|a", "completion": text, "reward": reward}
        for n, text, reward in ((0, "a|`b", 0.4), (2, "b|a", 1.0))
    ]
    for name, lines in (("metrics", steps), ("evaluations", evaluations), ("samples", samples)):
        (grpo / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = quickstart("summary").write_summary(tmp_path, {"pt": 60.0, "grpo": 120.0}, 42)
    assert found["held_out_reward"]["gain"] == 0.25
    assert found["push"] == {"milliseconds": 20.0, "pause_milliseconds": 0.0, "bytes": 100}
    assert found["minutes"]["total"] == 3.0
    page = (tmp_path / "summary.md").read_text()
    assert "0.500 → 0.750 (+0.250)" in page and "`a\\|'b`" in page
    assert json.loads((tmp_path / "summary.json").read_text())["samples"][0]["after"] == "b|a"
    assert "0.500 → 0.750" in capsys.readouterr().out
