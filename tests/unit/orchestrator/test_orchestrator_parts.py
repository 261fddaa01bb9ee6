"""Small parts of the orchestrator: metrics.jsonl, paths, GPUs, threads, ETA, messages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator_svc.jobs.eta import Eta
from orchestrator_svc.jobs.metrics_file import MetricsFile, read_metrics
from orchestrator_svc.jobs.plots import plot_lines
from orchestrator_svc.launchers.child import RestartPolicy
from orchestrator_svc.launchers.gpus import assign, visible_devices
from orchestrator_svc.launchers.local import threads
from orchestrator_svc.paths import check_output, check_paths, output_dir_of
from orchestrator_svc.service import job_id_of, make_job_id
from surogate.errors import ConfigError, InvalidInputError
from surogate.structs import from_struct, to_struct


def test_metrics_file_has_each_step_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append([(1, 0.0, {"loss": 3.0}), (2, 1.0, {"loss": float("inf"), "lr": 0.1})])
    file.append([(2, 1.0, {"loss": 9.0}), (3, 2.0, {"loss": 1.0})])
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "time": 0.0, "loss": 3.0},
        {"step": 2, "time": 1.0, "lr": 0.1},
        {"step": 3, "time": 2.0, "loss": 1.0},
    ]


def test_metrics_file_is_cut_back_to_the_step_that_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append([(step, 0.0, {"loss": 1.0}) for step in range(1, 8)])
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # a crash in the middle of a line
    file = MetricsFile(path)
    assert file.last_step == 7
    file.truncate(5)
    file.append([(6, 0.0, {"loss": 2.0})])
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 6]


def resolved(kind: str) -> SimpleNamespace:
    return SimpleNamespace(
        kind=kind, train=SimpleNamespace(output_dir="output"), orch=SimpleNamespace(output_dir="outputs/run_default")
    )


def test_output_dir(tmp_path: Path) -> None:
    given = {"train": {"output_dir": "a"}}
    assert output_dir_of(given, resolved("sft"), None, "j") == Path("a").resolve()
    assert output_dir_of(given, resolved("sft"), tmp_path, "j") == tmp_path / "a"
    assert output_dir_of({"train": {}}, resolved("sft"), tmp_path, "j") == tmp_path / "j"
    assert output_dir_of({"train": {}}, resolved("pt"), None, "j") == Path("output").resolve()
    assert output_dir_of({"orch": {}}, resolved("grpo"), None, "j") == Path("outputs/run_default").resolve()
    both = {"train": {"output_dir": "a"}, "orch": {"output_dir": "b"}}
    assert output_dir_of(both, resolved("grpo"), tmp_path, "j") == tmp_path / "b"


def test_a_relative_folder_may_not_be_one_of_the_system_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    with pytest.raises(ConfigError, match=r"train\.output_dir: is /, where other files lie"):
        output_dir_of({"train": {"output_dir": ".."}}, resolved("sft"), None, "j")
    with pytest.raises(ConfigError, match=r"train\.output_dir: is /usr/x, and /usr belongs to the system"):
        output_dir_of({"train": {"output_dir": "x"}}, resolved("sft"), None, "j")


@pytest.mark.parametrize("value", ["/etc", "../x", "a/../../x"])
def test_paths_outside_of_the_output_root_are_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_paths({"train": {"output_dir": "fine", "checkpoint_dir": value}}, tmp_path)
    assert [violation.field for violation in caught.value.violations] == ["train.checkpoint_dir"]
    check_paths({"train": {"output_dir": "fine/er", "checkpoint_dir": str(tmp_path / "x")}}, tmp_path)


def test_whole_numbers_survive_a_struct() -> None:
    config = {"a": 3, "b": 0.5, "c": [1, {"d": 2}], "e": "x", "f": None, "g": True}
    back = from_struct(to_struct(config))
    assert back == config
    assert isinstance(back["a"], int)
    assert isinstance(back["c"][0], int)


def test_job_names() -> None:
    assert job_id_of("jobs/my-job-1") == "my-job-1"
    assert job_id_of(f"jobs/{make_job_id('sft')}")
    for name in ("my-job", "jobs/", "jobs/-a", "jobs/A", "jobs/a/b", "jobs/" + "a" * 64):
        with pytest.raises(InvalidInputError):
            job_id_of(name)


def test_gpus_are_split_between_trainer_and_replicas() -> None:
    four = ("0", "1", "2", "3")
    assert assign(four, trainer=1, replicas=2, tp=1) == assign(four, 1, 2, 1)
    split = assign(four, trainer=2, replicas=2, tp=1)
    assert (split.trainer, split.inference) == (("0", "1"), (("2",), ("3",)))
    split = assign(four, trainer=0, replicas=1, tp=2)
    assert (split.trainer, split.inference) == (("0", "1"), (("2", "3"),))
    alone = assign(("0",), trainer=1, replicas=2, tp=1)
    assert (alone.trainer, alone.inference) == (("0",), (("0",), ("0",)))
    shared = assign(("0", "1"), trainer=1, replicas=2, tp=2)
    assert shared.inference == (("0", "1"), ("0", "1"))


async def test_visible_devices_come_from_the_environment() -> None:
    assert await visible_devices({"CUDA_VISIBLE_DEVICES": "2, GPU-a"}) == ("2", "GPU-a")
    assert await visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == ()


def test_threads() -> None:
    assert threads("trainer", 2, lambda: 8) == 8
    assert threads("inference", 2, lambda: 8) == 4
    assert threads("inference", 16, lambda: 8) == 1
    assert threads("reward", 1, lambda: 8) == 1


def test_restarts_wait_longer_each_time() -> None:
    policy = RestartPolicy(first_delay=1.0, max_delay=5.0)
    assert [policy.delay(n) for n in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 5.0]


def test_eta_follows_the_step_time() -> None:
    now = [0.0]
    eta = Eta(lambda: now[0])
    assert eta.observe(1, 10) is None
    now[0] = 2.0
    assert eta.observe(2, 10) == pytest.approx(16.0)
    assert eta.observe(3, 0) is None
    assert eta.observe(10, 10) is None, "how long the model takes to be written is not told by steps"


def test_time_in_which_a_worker_was_away_says_nothing_about_the_pace() -> None:
    now = [0.0]
    eta = Eta(lambda: now[0])
    eta.observe(1, 10)
    now[0] = 2.0
    eta.observe(2, 10)
    eta.interrupt()
    now[0] = 1000.0
    assert eta.observe(3, 10) == pytest.approx(14.0)
    now[0] = 1002.0
    assert eta.observe(4, 10) == pytest.approx(12.0)


def test_plot(tmp_path: Path) -> None:
    plot_lines(tmp_path / "plots" / "loss.png", {"a": [(1, 2.0), (2, 1.0)], "none": []}, title="t", ylabel="loss")
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_job_does_not_write_over_the_model_that_it_starts_from(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    folder = (tmp_path / "model").resolve()
    for model in (tmp_path / "model", tmp_path / "link", tmp_path / "other" / ".." / "model"):
        with pytest.raises(
            ConfigError, match=r"train\.output_dir: is the folder of the model .*: choose another folder"
        ):
            check_output(folder, str(model))
    for model in (str(tmp_path), str(folder / "checkpoint-3"), "org/model", "s3://bucket/model"):
        check_output(folder, model)
