"""A PT job on a tiny model with the real trainer, through kills of the trainer and of the orchestrator."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator_svc.jobs.metrics_file import read_metrics
from tests.e2e.test_jobs_processes import children_of, gone, orchestrator_process, steps_of
from tests.helpers.models.tiny import make_tiny_model, make_tiny_tokenizer
from tests.helpers.object_store import BUCKET, object_store
from tests.helpers.orchestrator import State

STEPS = 30
REAL = {"worker-modules": "{}", "worker-stop-seconds": "20"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with text to train it on beside it."""
    folder = tmp_path_factory.mktemp("model")
    make_tiny_tokenizer(folder)
    make_tiny_model(folder)
    lines = [json.dumps({"text": f"{n} sheep jump over the fence, and {n + 1} follow them."}) for n in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def pt_config(model: Path, output_dir: Path, **train: Any) -> dict[str, Any]:
    keys = {
        "model": str(model),
        "datasets": [{"path": str(model / "text.jsonl"), "type": "text"}],
        "output_dir": str(output_dir),
        "max_steps": STEPS,
        "save_steps": 10,
        "sequence_len": 128,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "torch_dtype": "float32",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "eval_steps": 15,
    }
    return {"kind": "pt", "train": {**keys, **train}}


def losses(output_dir: Path) -> dict[int, float]:
    return {int(line["step"]): line["loss"] for line in read_metrics(output_dir / "metrics.jsonl")}


async def undisturbed(folder: Path, model: Path) -> dict[int, float]:
    """Losses of a run that nobody interrupts."""
    async with orchestrator_process(folder, log="undisturbed.log", **REAL) as (orchestrator, _):
        job = await orchestrator.create(pt_config(model, folder / "calm"))
        done = await orchestrator.ended(job.name)
    assert done.state == State.STATE_SUCCEEDED, done.error.message
    assert (folder / "calm" / "plots" / "loss.png").exists()
    assert (folder / "calm" / "config.json").exists(), "the final model is where the job writes"
    return losses(folder / "calm")


async def test_a_job_that_is_killed_twice_ends_as_one_that_is_not(tmp_path: Path, model: Path) -> None:
    calm = await undisturbed(tmp_path, model)
    config = pt_config(model, tmp_path / "killed")
    async with orchestrator_process(tmp_path, log="first.log", **REAL) as (orchestrator, process):
        job = await orchestrator.create(config)
        await orchestrator.until_step(job.name, 12)
        os.kill(children_of(process.process.pid)[0], signal.SIGKILL)
        await orchestrator.until_step(job.name, 22)
        children = children_of(process.process.pid)
        grandchildren = [pid for child in children for pid in children_of(child)]
        process.process.kill()
        await process.process.wait()
        await gone([*children, *grandchildren])
    async with orchestrator_process(tmp_path, log="second.log", **REAL) as (orchestrator, _):
        history = await orchestrator.history(job.name)
        done = await orchestrator.get(job.name)
    assert done.state == State.STATE_SUCCEEDED, done.error.message
    assert steps_of(history, replayed=False) == list(range(1, STEPS + 1))
    assert losses(tmp_path / "killed") == calm
    assert calm[STEPS] < calm[1]


@pytest.mark.slow
async def test_a_job_whose_disk_is_lost_goes_on_from_the_object_store(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a pod without a volume. Checkpoints of before the job are not looked at, those of the job are."""
    calm = await undisturbed(tmp_path, model)
    with object_store(monkeypatch) as store:
        kept = {"checkpoint_dir": f"s3://{BUCKET}/runs/a", "resume_from_checkpoint": False}
        async with orchestrator_process(tmp_path, log="first.log", **REAL) as (orchestrator, process):
            job = await orchestrator.create(pt_config(model, tmp_path / "moved", **kept))
            await orchestrator.until_step(job.name, 12)
            children = children_of(process.process.pid)
            grandchildren = [pid for child in children for pid in children_of(child)]
            process.process.kill()
            await process.process.wait()
            await gone([*children, *grandchildren])
        for checkpoint in (tmp_path / "moved").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        async with orchestrator_process(tmp_path, log="second.log", **REAL) as (orchestrator, _):
            history = await orchestrator.history(job.name)
            done = await orchestrator.get(job.name)
        assert done.state == State.STATE_SUCCEEDED, done.error.message
        told = "\n".join(event.notice.text for event in history if event.HasField("notice"))
        assert "training goes on from the checkpoint of step 10" in told
        assert losses(tmp_path / "moved") == calm
        assert "runs/a/final/model.safetensors" in store.stored("runs/a/final")


async def test_bad_input_fails_the_job_and_names_the_key(tmp_path: Path, model: Path) -> None:
    async with orchestrator_process(tmp_path, **REAL) as (orchestrator, _):
        missing = [{"path": str(tmp_path / "none.jsonl"), "type": "text"}]
        job = await orchestrator.create(pt_config(model, tmp_path / "out", datasets=missing))
        ended = await orchestrator.ended(job.name)
    assert ended.state == State.STATE_FAILED
    assert "none.jsonl" in ended.error.message
    assert "Traceback" not in ended.error.message
