"""`surogate config check`: what a report says, and which keys are paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from surogate.config.check import check_files, part_of
from surogate.config.load import parse_yaml
from surogate.config.paths import absolute_paths, missing_paths

PT = "model: m\noptimizer: adamw\ndatasets:\n  - {path: a, type: text}\n"
TRAIN = "model: m\noptimizer: adamw\nmax_steps: 5\nlora_rank: 4\n"
INFER = "max_num_seqs: 4\n"
ORCH = "env:\n  - id: reverse-text\nrollouts_per_example: 8\n"


def write(folder: Path, **texts: str) -> list[Path]:
    paths = [folder / f"{name}.yaml" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def test_a_file_that_is_right(tmp_path: Path) -> None:
    report = check_files(write(tmp_path, config=PT))
    assert report.ok
    assert report.render().startswith(f"{tmp_path}/config.yaml (pretraining): OK\n  resolves to:\n    kind: pt\n")
    assert "      learning_rate: 0.0002\n" in report.render()


def test_a_file_that_is_wrong(tmp_path: Path) -> None:
    report = check_files(write(tmp_path, config=f"{PT}lerning_rate: 1\nsequence_len: 0\n"))
    assert not report.ok
    assert report.render() == (
        f"{tmp_path}/config.yaml (pretraining): wrong\n"
        f"  error: {tmp_path}/config.yaml:5: train.lerning_rate: unknown key; did you mean `learning_rate`?\n"
        f"  error: {tmp_path}/config.yaml:6: train.sequence_len: must be 1 or more, got 0"
    )


def test_warnings_have_their_line(tmp_path: Path) -> None:
    report = check_files(write(tmp_path, config=f"{PT}use_cuda_graphs: true\n"))
    assert report.warnings == [
        f"{tmp_path}/config.yaml:5: train.use_cuda_graphs: has no effect here: it tunes an engine that this is not"
    ]


def test_the_files_of_a_grpo_job_are_checked_together(tmp_path: Path) -> None:
    paths = write(tmp_path, orch=ORCH, train=TRAIN, infer=INFER)
    report = check_files(paths, ["orch.sampling.max_tokens=8"])
    assert report.ok
    assert len(report.sections) == 1
    assert report.sections[0].resolved["infer"]["max_lora_rank"] == 4
    assert report.sections[0].resolved["orch"]["sampling"]["max_tokens"] == 8
    wrong = check_files(paths, ["infer.max_lora_rank=2"])
    assert wrong.errors == ["--set infer.max_lora_rank=2: infer.max_lora_rank: is 2, less than train.lora_rank (4)"]


@pytest.mark.parametrize(
    ("name", "text"), [("orch", ORCH), ("infer", INFER), ("train", TRAIN), ("train", "lora: true\n")]
)
def test_each_file_of_a_grpo_job_may_be_checked_by_itself(tmp_path: Path, name: str, text: str) -> None:
    report = check_files(write(tmp_path, anything=text))
    assert report.ok
    assert report.sections[0].title == f"{tmp_path}/anything.yaml ({name}.yaml of a GRPO job, by itself)"


def test_what_is_wrong_with_one_file_hides_no_other(tmp_path: Path) -> None:
    (good, bad) = write(tmp_path, good=PT, bad="a: [\n")
    report = check_files([tmp_path / "missing.yaml", bad, good], ["train.x=1"])
    assert report.errors == [
        f"{tmp_path}/missing.yaml: no such file",
        f"{tmp_path}/bad.yaml:2: is not YAML: expected the node content, but found '<stream end>'",
        "--set train.x=1: train.train: unknown key; did you mean `train_seed`?",
    ]


def test_bad_overrides_are_reported(tmp_path: Path) -> None:
    report = check_files(write(tmp_path, orch=ORCH, train=TRAIN, infer=INFER), ["learning_rate=1"])
    assert report.errors[0].startswith("learning_rate: --set learning_rate=1: must begin with one of")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: m\n", "train"),
        ("model: {name: m}\n", "orch"),
        ("env: []\n", "orch"),
        ("max_model_len: 64\nmax_num_seqs: 2\n", "infer"),
        ("lora: true\nmodel: m\n", "train"),
    ],
)
def test_files_are_told_apart_by_their_keys(text: str, part: str) -> None:
    assert part_of(parse_yaml(text, "x.yaml")) == part


def test_the_name_tells_where_keys_do_not() -> None:
    assert part_of(parse_yaml("", "my-infer.yaml")) == "infer"


def test_paths_become_absolute_where_they_exist(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "p.jsonl").write_text("")
    config = {
        "kind": "grpo",
        "train": {"model": "./m", "output_dir": "out", "datasets": [{"path": "org/data"}, {"path": "p.jsonl"}]},
        "infer": {"model": "m"},
        "orch": {"model": {"name": "org/model"}, "env": [{"id": "x", "args": {"dataset": "p.jsonl", "n": 1}}]},
    }
    changed = absolute_paths(config, tmp_path)
    assert changed["train"]["model"] == changed["infer"]["model"] == str(tmp_path / "m")
    assert changed["train"]["datasets"] == [{"path": "org/data"}, {"path": str(tmp_path / "p.jsonl")}]
    assert changed["orch"]["model"]["name"] == "org/model"
    assert changed["orch"]["env"][0]["args"] == {"dataset": str(tmp_path / "p.jsonl"), "n": 1}
    assert changed["train"]["output_dir"] == "out"
    assert absolute_paths(config, tmp_path, outputs=True)["train"]["output_dir"] == str(tmp_path / "out")
    assert config["train"]["model"] == "./m"  # type: ignore[index]


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    config = {
        "train": {"model": "./m", "datasets": [{"path": "org/data"}, {"path": "/no/such.jsonl"}, {"path": "a.csv"}]}
    }
    assert [str(item) for item in missing_paths(config, tmp_path)] == [
        "train.model: './m' does not exist",
        "train.datasets.1.path: '/no/such.jsonl' does not exist",
        "train.datasets.2.path: 'a.csv' does not exist",
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("save_steps: 99999999999999999999", "train.save_steps: must be a number between -9007199254740992 and"),
        ('system: "a\\ud800"', "train.system: must be text, which half of a surrogate pair is not"),
        ('output_dir: "a\\0b"', "train.output_dir: must not contain the character U+0000, got 'a\\x00b'"),
        ("recompute:", "train.recompute: is empty: give a value, or remove the key to use the default"),
        ("recompute: partly", "train.recompute: must be true, false or selective, got 'partly'"),
    ],
)
def test_values_that_nothing_can_hold(tmp_path: Path, line: str, error: str) -> None:
    (file,) = write(tmp_path, config=f"model: m\ndatasets: [{{path: d.jsonl, type: text}}]\n{line}\n")
    assert [item.split(error)[0] for item in check_files([file]).errors] == [f"{file}:3: "]


@pytest.mark.parametrize(
    ("datasets", "error"),
    [
        ("[{path: d.jsonl, type: {}}]", "train.datasets.0: `type` must be one of"),
        ("[{path: d.jsonl, type: [1]}]", "train.datasets.0: `type` must be one of"),
        ("[1]", "train.datasets.0: must be a mapping (lines of `key: value`), got 1"),
    ],
)
def test_datasets_that_are_none(tmp_path: Path, datasets: str, error: str) -> None:
    (file,) = write(tmp_path, config=f"model: m\ndatasets: {datasets}\n")
    (found,) = check_files([file]).errors
    assert error in found


def test_a_file_without_keys_is_told(tmp_path: Path) -> None:
    (file,) = write(tmp_path, config="# nothing yet\n")
    assert check_files([file]).warnings == [f"{file}: sets no key"]
