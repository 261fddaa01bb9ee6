"""The tracking process with the real libraries, writing locally: what it reports, once, over restarts and failures."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator_svc.tracking.memory import Memory
from orchestrator_svc.tracking.spec import Spec
from orchestrator_svc.tracking.tail import Tail
from surogate.rollouts import write_step

STEPS = [{"step": n, "time": 1000.0 + n, "loss": 3.0 / n, "lr": 1e-3} for n in (1, 2, 3)]
EVALUATION = {"step": 2, "environment": "validation", "eval/loss": 1.25, "eval/perplexity": 3.5}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rollout(step: int, reward: float) -> dict[str, Any]:
    return {
        "step": step,
        "prompt": '[{"role": "user", "content": "hi"}]',
        "completion": f"answer {reward}",
        "reward": reward,
        "components": {},
        "token_ids": [1, 2, 3],
    }


def run(folder: Path, *trackers: str, end: str = "SUCCEEDED", **keys: Any) -> list[str]:
    """Runs the process on a folder whose job ends with `end`; returns what it said."""
    spec = Spec(job_id="job-1", kind="sft", output_dir=str(folder), trackers=trackers, name="run", **keys)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MLFLOW"))}
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator_svc.tracking"],
        input=spec.line().decode() + (f"{end}\n" if end else ""),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_tail_gives_whole_lines_once_and_starts_anew_with_another_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tail = Tail(path)
    assert list(tail.new_lines()) == []
    path.write_text('{"step": 1}\n{"step"')
    assert list(tail.new_lines()) == [{"step": 1}]
    with path.open("a") as file:
        file.write(": 2}\n")
    assert list(tail.new_lines()) == [{"step": 2}]
    assert list(tail.new_lines()) == []
    other = tmp_path / "other"
    other.write_text('{"step": 1}\n{"step": 9}\n')
    other.replace(path)
    assert list(tail.new_lines()) == [{"step": 1}, {"step": 9}]


def test_the_log_file_has_a_line_a_step_over_restarts(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", STEPS[:2])
    assert run(tmp_path, log_file="logs/train.log", end="") == []
    write_lines(tmp_path / "metrics.jsonl", STEPS)
    write_lines(tmp_path / "evaluations.jsonl", [EVALUATION])
    run(tmp_path, log_file="logs/train.log")
    lines = (tmp_path / "logs" / "train.log").read_text().splitlines()
    told = [line.split(" ", 2)[2] for line in lines]
    assert told == [
        "step 1 loss=3 lr=0.001",
        "step 2 loss=1.5 lr=0.001",
        "interrupted",
        "step 3 loss=1 lr=0.001",
        "step 2 eval/validation/loss=1.25 eval/validation/perplexity=3.5",
        "succeeded",
    ]


def test_tensorboard_has_scalars_samples_and_histograms(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_lines(tmp_path / "metrics.jsonl", STEPS[:2])
    for step in (1, 2):
        write_step(tmp_path, step, [rollout(step, reward) for reward in (0.0, 0.5, 1.0)])
    keys: dict[str, Any] = {"samples": True, "distributions": True, "interval": 10}
    assert run(tmp_path, "tensorboard", end="", **keys) == []
    write_lines(tmp_path / "metrics.jsonl", STEPS)
    write_lines(tmp_path / "evaluations.jsonl", [EVALUATION])
    assert run(tmp_path, "tensorboard", **keys) == []
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.wall_time) for e in events.Scalars("loss")] == [(1, 1001.0), (2, 1002.0), (3, 1003.0)]
    assert [e.value for e in events.Scalars("eval/validation/loss")] == [1.25]
    (histogram,) = events.Histograms("reward")
    assert (histogram.step, histogram.histogram_value.num) == (1, 3)
    (shown,) = events.Tensors("samples")
    assert b"answer 0.5" in shown.tensor_proto.string_val[1]


def test_mlflow_has_one_run_over_restarts(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    config = {"train": {"learning_rate": 1e-3, "datasets": [1], "model": "m"}}
    write_lines(tmp_path / "metrics.jsonl", STEPS[:2])
    assert run(tmp_path, "mlflow", end="", config=config, project="P") == []
    write_lines(tmp_path / "metrics.jsonl", STEPS)
    assert run(tmp_path, "mlflow", config=config, project="P") == []
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("P").experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params == {"train.learning_rate": "0.001", "train.model": "m"}
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(m.step, m.value, m.timestamp) for m in history] == [(n, 3.0 / n, 1_000_000 + 1000 * n) for n in (1, 2, 3)]


def test_wandb_writes_an_offline_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    write_lines(tmp_path / "metrics.jsonl", STEPS)
    write_step(tmp_path, 1, [rollout(1, reward) for reward in (0.0, 1.0)])
    keys: dict[str, Any] = {"offline": True, "samples": True, "distributions": True}
    assert run(tmp_path, "wandb", project="P", config={"train": {"lr": 1}}, **keys) == []
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-job-1.wandb")
    history = [record.history for record in records(file) if record.HasField("history")]
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in history
    ]
    told = [(float(row["step"]), float(row["loss"])) for row in rows if "loss" in row]
    assert told == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert any(key.startswith("samples") for row in rows for key in row)
    assert any(key.startswith("reward") for row in rows for key in row)


def records(file: Path) -> list[Any]:
    """The records of a run's file: after 7 bytes of its own, a log as LevelDB writes it, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, found, place, parts = file.read_bytes(), [], 7, b""
    while place + 7 <= len(data):
        if (left := -place % 32_768) < 7 and left:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def test_a_tracker_that_fails_is_said_and_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    write_lines(tmp_path / "metrics.jsonl", STEPS)
    said = run(tmp_path, "tensorboard", log_file="train.log")
    assert len(said) == 1
    assert said[0].startswith("nothing is reported to tensorboard: ")
    assert len((tmp_path / "train.log").read_text().splitlines()) == 4


def test_a_tracker_that_never_answers_keeps_nothing_from_the_others(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", STEPS)
    others = {"log_file": 3, "tensorboard": 3}
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections are taken by the kernel, and that is all
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = started(tmp_path, "mlflow", "tensorboard", uri=uri, log_file="train.log", patience=10.0)
        with process as child:
            deadline = time.monotonic() + 200
            while noted(tmp_path) != others and time.monotonic() < deadline and child.poll() is None:
                time.sleep(0.2)
            said, _ = child.communicate("SUCCEEDED\n", timeout=200)
    assert noted(tmp_path) == others
    assert said.splitlines()[-1] == "mlflow does not answer; what it has not taken is not reported to it"
    assert len((tmp_path / "train.log").read_text().splitlines()) == 4
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"loss") == len(STEPS)


def started(folder: Path, *trackers: str, uri: str, **keys: Any) -> subprocess.Popen[str]:
    spec = Spec(job_id="job-1", kind="sft", output_dir=str(folder), trackers=trackers, name="run", **keys)
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator_svc.tracking"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri},
    )
    assert process.stdin is not None
    process.stdin.write(spec.line().decode())
    process.stdin.flush()
    return process


def noted(folder: Path) -> dict[str, int]:
    """The last step that was reported to each tracker that has opened."""
    try:
        notes = json.loads((folder / ".surogate" / "tracking.json").read_text())["trackers"]
    except FileNotFoundError:
        return {}
    return {name: done.get("step", 0) for name, done in notes.items()}


def test_notes_of_before_each_tracker_had_its_own_are_read(tmp_path: Path) -> None:
    (tmp_path / ".surogate").mkdir()
    old = {"runs": {"mlflow": {"run": "r1"}, "log_file": {}}, "step": 2, "evaluated": {"validation": 2}}
    (tmp_path / ".surogate" / "tracking.json").write_text(json.dumps(old))
    memory = Memory(tmp_path, print)
    assert memory.of("mlflow") == {"run": {"run": "r1"}, "step": 2, "evaluated": {"validation": 2}}
    assert memory.of("wandb") == {}


def test_notes_that_cannot_be_written_are_said_once(tmp_path: Path) -> None:
    (tmp_path / ".surogate").write_text("in the way")
    said: list[str] = []
    memory = Memory(tmp_path, said.append)
    for step in (1, 2):
        memory.keep("wandb", {"step": step})
    assert len(said) == 1 and "cannot be noted" in said[0]
    assert memory.of("wandb") == {"step": 2}
