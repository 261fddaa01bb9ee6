"""What a user can get wrong, on the command line: an error that names the key, a failing exit code, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.grpo.grpo_files import Keys, write_grpo_files
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.shell import Shell

TEXT = {"path": "text.jsonl", "type": "text"}


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder with a model, one without weights, texts, and a file of none."""
    folder = tmp_path_factory.mktemp("bad")
    make_tiny_model(folder / "model")
    shutil.copytree(folder / "model", folder / "bare")
    (folder / "bare" / "model.safetensors").unlink()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} sheep"}) + "\n" for n in range(50)))
    (folder / "empty.jsonl").touch()
    return Shell(folder)


@pytest.fixture(autouse=True)
def nothing_left(shell: Shell) -> Iterator[None]:
    yield
    shell.wait_until(lambda: not shell.processes())
    shutil.rmtree(shell.folder / "out", ignore_errors=True)


def pt_command(shell: Shell, **keys: Any) -> list[str]:
    train = {"model": "./model", "datasets": [TEXT], "output_dir": "out", "max_steps": 2, "sequence_len": 64, **keys}
    (shell.folder / "train.yaml").write_text(json.dumps(train, indent=1))
    return ["pt", "train.yaml"]


def refused(shell: Shell, arguments: list[str], said: str, code: int) -> None:
    """The command fails with exactly that exit code, and says so in one `error:` line that holds `said`."""
    found, out, err = shell.run(*arguments)
    assert found == code, out + err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0], err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"learning_rat": 1e-4}, "train.learning_rat: unknown key; did you mean `learning_rate`?"),
        ({"datasets": [{**TEXT, "path": "none.jsonl"}]}, "train.datasets.0.path: 'none.jsonl' does not exist"),
        ({"model": "./none"}, "train.model: './none' does not exist"),
    ],
)
def test_wrong_training_files_start_nothing(shell: Shell, keys: dict[str, Any], said: str) -> None:
    refused(shell, pt_command(shell, **keys), said, 2)
    assert not (shell.folder / "out").exists()


def test_a_file_of_configuration_that_is_not_there(shell: Shell) -> None:
    refused(shell, ["pt", "none.yaml"], "none.yaml: no such file", 2)


@pytest.mark.parametrize(
    ("part", "keys", "said"),
    [
        ("infer", {"max_lora_rank": 4}, "infer.max_lora_rank: is 4, less than train.lora_rank (8)"),
        ("orch", {"max_steps": 5}, "orch.max_steps: is 5, and train.max_steps is 8: they must be the same"),
        ("orch", {"seq_len": 64}, "orch.seq_len: is 64, and train.sequence_len is 96"),
        ("infer", {"model": "./bare"}, "infer.model: is './bare', and train.model is './model'"),
        ("orch", {"sampling": {"max_token": 3}}, "orch.sampling.max_token: unknown key; did you mean `max_tokens`?"),
    ],
)
def test_files_of_a_grpo_job_that_disagree_start_nothing(shell: Shell, part: str, keys: Keys, said: str) -> None:
    refused(shell, write_grpo_files(shell.folder, **{part: keys}), said, 2)
    assert not (shell.folder / "out").exists()


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (
            {"id": "reverse-txt"},
            "orch.env.0.id: no environment 'reverse-txt' (did you mean 'reverse-text'?); this service has",
        ),
        ({"id": "exact-match", "args": {"dataset": "empty.jsonl"}}, "orch.env.0.args.dataset: "),
        ({"id": "exact-match", "args": {"dataset": "text.jsonl"}}, "orch.env.0.args.prompt_field: row 1 has no column"),
    ],
)
def test_environments_that_cannot_be_meant_fail_the_job(shell: Shell, env: dict[str, Any], said: str) -> None:
    refused(shell, write_grpo_files(shell.folder, orch={"env": [env]}), said, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"datasets": [{**TEXT, "path": "empty.jsonl"}]}, "train.datasets.0.path: "),
        ({"datasets": [{**TEXT, "text_field": "txt"}]}, "train.datasets.0.text_field: there is no column `txt`"),
        ({"model": "./bare"}, "has no weights"),
        ({"sequence_len": 4096}, "train.sequence_len: 4096 exceeds the model's context of 512 tokens"),
    ],
)
def test_what_the_trainer_finds_fails_the_job(shell: Shell, keys: dict[str, Any], said: str) -> None:
    refused(shell, pt_command(shell, **keys), said, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_prompts_longer_than_the_context_fail_the_job_before_a_step(shell: Shell) -> None:
    texts = {"alphabet": "abc", "min_chars": 200, "max_chars": 300}
    command = write_grpo_files(shell.folder, orch={"env": [{"id": "reverse-text", "args": texts}]})
    refused(shell, command, "orch.seq_len: every prompt is too long", 1)
