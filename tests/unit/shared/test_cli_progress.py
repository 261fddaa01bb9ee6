"""What the command line makes of a job's events: progress, lines, and the last table."""

import io
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from surogate.cli import units
from surogate.cli.running import words
from surogate.cli.running.display import PlainDisplay
from surogate.cli.running.live import LiveDisplay
from surogate.cli.running.plan import plan
from surogate.cli.running.progress import Progress
from surogate.cli.running.summary import print_summary
from surogate.v1 import job_pb2

EVENT = job_pb2.JobEvent


def step(number: int, metrics: Mapping[str, float], *, at: float = 0.0, replayed: bool = False) -> EVENT:
    event = EVENT(
        sequence=number,
        step_completed=job_pb2.StepCompleted(step=number, max_steps=10, metrics=metrics, replayed=replayed),
    )
    event.time.FromMicroseconds(int(at * 1e6))
    return event


def evaluated(number: int, reward: float) -> EVENT:
    return EVENT(
        evaluation_completed=job_pb2.EvaluationCompleted(
            step=number, environment="reverse-text", metrics={"reward/mean": reward}
        )
    )


def shown(number: int, completion: str, reward: float) -> EVENT:
    sample = job_pb2.Sample(
        environment="reverse-text", prompt="abc", completion=completion, answer="cba", reward=reward, held_out=True
    )
    return EVENT(samples_shown=job_pb2.SamplesShown(step=number, samples=[sample]))


def a_grpo_run() -> list[EVENT]:
    metrics = {"reward/mean": 0.5, "loss": 0.01, "masked/fraction": 0.004, "tokens_per_second": 5200.0}
    times = {"time/generate": 0.8, "time/score": 0.0, "time/train": 0.4, "time/push": 0.05, "time/step": 1.25}
    return [
        EVENT(state_changed=job_pb2.StateChanged(state=job_pb2.Job.STATE_RUNNING, status_message="training")),
        evaluated(0, 0.5),
        shown(0, "abc", 0.33),
        step(1, metrics | times, at=10),
        step(2, metrics | times | {"reward/mean": 0.6}, at=12),
        EVENT(
            weights_pushed=job_pb2.WeightsPushed(policy_version=2, num_bytes=65536, seconds=0.05, pause_seconds=0.01)
        ),
        EVENT(notice=job_pb2.Notice(severity=job_pb2.Notice.SEVERITY_WARNING, component="reward", text="slow")),
        evaluated(2, 0.75),
        shown(2, "cba", 1.0),
        EVENT(checkpoint_saved=job_pb2.CheckpointSaved(step=2, path="/out/checkpoint-2")),
    ]


def after(events: list[EVENT]) -> Progress:
    progress = Progress()
    for event in events:
        progress.apply(event)
    return progress


def test_progress_keeps_the_newest_and_the_first() -> None:
    progress = after(a_grpo_run())
    assert (progress.state, progress.step, progress.max_steps) == ("running", 2, 10)
    assert (progress.first_metrics["reward/mean"], progress.metrics["reward/mean"]) == (0.5, 0.6)
    assert progress.phases["train"].value == 0.4
    assert progress.eta == 2.0 * 8
    waiting = job_pb2.StateChanged(state=job_pb2.Job.STATE_RUNNING, status_message="waiting for the trainer")
    progress.apply(EVENT(state_changed=waiting))
    assert progress.eta is None, "while the trainer is away, nobody knows"
    progress.apply(step(2, {}, at=12, replayed=True))
    assert progress.eta is None


def test_replayed_steps_take_no_part_in_times() -> None:
    progress = after([step(1, {"time/step": 9.0}, replayed=True), step(2, {"time/step": 1.0})])
    assert progress.phases["step"].value == 1.0
    assert progress.eta is None


def test_after_the_last_step_no_time_is_told() -> None:
    progress = after([step(number, {}, at=number) for number in (8, 9)])
    assert progress.eta == 1.0
    progress.apply(step(10, {}, at=10))
    assert progress.eta is None
    assert "ETA" not in words.step_line(progress)


def test_an_evaluation_that_is_repeated_counts_once() -> None:
    progress = after([evaluated(0, 0.5), evaluated(2, 0.7), evaluated(2, 0.75)])
    assert [item.metrics["reward/mean"] for item in progress.evaluations["reverse-text"]] == [0.5, 0.75]


def test_plain_lines() -> None:
    out = io.StringIO()
    display, progress = PlainDisplay(out), Progress()
    for event in a_grpo_run():
        progress.apply(event)
        display.show(event, progress)
    assert out.getvalue().splitlines() == [
        "running: training",
        "evaluation before training, reverse-text: reward/mean 0.5",
        "step 1/10  reward 0.500  loss 0.01  masked 0.4%  5.2k tokens/s  "
        "1.2 s (generate 800 ms, train 400 ms, push 50 ms)",
        "step 2/10  reward 0.600  loss 0.01  masked 0.4%  5.2k tokens/s  "
        "1.2 s (generate 800 ms, train 400 ms, push 50 ms)  ETA 0:16",
        "warning: [reward] slow",
        "evaluation after step 2, reverse-text: reward/mean 0.75",
        "checkpoint at step 2: /out/checkpoint-2",
    ]


def test_a_replayed_step_says_so() -> None:
    assert words.step_line(after([step(3, {"loss": 2.0})]), replayed=True) == (
        "step 3/10  loss 2  trained again since the last checkpoint"
    )


def test_the_live_display_shows_the_bar_and_notices() -> None:
    out = io.StringIO()
    display = LiveDisplay(Console(file=out, force_terminal=True, width=120))
    progress = Progress()
    for event in a_grpo_run():
        progress.apply(event)
        display.show(event, progress)
    display.close()
    text = out.getvalue()
    for part in ("warning: [reward] slow", "step 2/10", "ETA 0:16", "(at first 0.500)", "running: training"):
        assert part in text


def test_the_last_table(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "reward.png").write_bytes(b"png")
    job = job_pb2.Job(name="jobs/j", kind=job_pb2.Job.KIND_GRPO, state=job_pb2.Job.STATE_SUCCEEDED, step=2, max_steps=2)
    job.output_dir = str(tmp_path)
    job.config.update({"train": {"model": "tiny", "lora": True}})
    job.start_time.FromSeconds(0)
    job.end_time.FromSeconds(90)
    out = io.StringIO()
    print_summary(job, after(a_grpo_run()), local=True, console=Console(file=out, width=200))
    text = out.getvalue()
    for part in (
        "jobs/j (grpo): succeeded",
        "tiny (LoRA adapter)",
        "2 of 2 in 1:30",
        "held-out reward, reverse-text",
        "0.500 → 0.750 (+0.250; before → step 2)",
        "1.2 s: generate 800 ms (64%), score 0 ms (0%), train 400 ms (32%), push 50 ms (4%)",
        "50 ms and 65,536 bytes to each replica, generation paused 10 ms (mean of 1)",
        str(tmp_path / "plots" / "reward.png"),
        "samples",
        "0.33",
    ):
        assert part in text, text


def last_table(job: job_pb2.Job) -> str:
    out = io.StringIO()
    print_summary(job, Progress(), local=True, console=Console(file=out, width=300))
    return out.getvalue()


def test_the_last_table_says_what_to_do_next(tmp_path: Path) -> None:
    job = job_pb2.Job(name="jobs/j", kind=job_pb2.Job.KIND_PT, state=job_pb2.Job.STATE_SUCCEEDED)
    job.output_dir = str(tmp_path)
    assert f"surogate serve inference --model {tmp_path} --listen" in last_table(job)
    assert '--raw "How it begins"' in last_table(job)
    (tmp_path / "adapter_model.safetensors").touch()
    job.kind = job_pb2.Job.KIND_SFT
    assert f"surogate merge --adapter {tmp_path} --output {tmp_path}/merged" in last_table(job)
    (tmp_path / "merged").mkdir()
    assert "surogate merge" not in last_table(job)
    assert f"serve inference --model {tmp_path}/merged" in last_table(job)
    job.state = job_pb2.Job.STATE_CANCELLED
    job.checkpoint = str(tmp_path / "checkpoint-3")
    assert "the same command goes on from the checkpoint" in last_table(job)
    assert "talk to it" not in last_table(job)


def test_what_a_job_is_about_to_do() -> None:
    train = {"model": "m", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "sequence_len": 2048}
    pt = job_pb2.Job(kind=job_pb2.Job.KIND_PT, max_steps=2000)
    pt.config.update({"train": {**train, "from_scratch": True, "gpus": 2}})
    assert plan(pt) == (
        "pretraining all weights of m, from random ones: 2,000 steps of 16 sequences of up to 2,048 tokens"
    )
    sft = job_pb2.Job(kind=job_pb2.Job.KIND_SFT)
    sft.config.update({"train": {**train, "lora": True, "lora_rank": 8, "qlora_bnb": True, "num_epochs": 3}})
    assert plan(sft) == (
        "fine-tuning a LoRA adapter (rank 8, base in NF4) of m: 3 epochs, in steps of 8 sequences of up to 2,048 tokens"
    )
    grpo = job_pb2.Job(kind=job_pb2.Job.KIND_GRPO, max_steps=20)
    orch = {"batch_size": 128, "rollouts_per_example": 8, "env": [{"id": "math", "name": "easy"}, {"id": "code"}]}
    grpo.config.update({"train": {**train, "lora": True, "lora_rank": 16}, "orch": orch})
    assert plan(grpo) == (
        "GRPO of a LoRA adapter (rank 16) of m: 20 steps of 128 rollouts, 8 for each prompt, rewarded by easy, code"
    )
    grpo.config.update({"infer": {"enable_lora": False}})
    assert plan(grpo).startswith("GRPO of a LoRA adapter (rank 16), pushed as merged weights, of m: 20 steps")


def test_units() -> None:
    assert [units.seconds(value) for value in (0.0104, 12.34, 61, 3723)] == ["10 ms", "12.3 s", "1:01", "1:02:03"]
    assert [units.count(value) for value in (950, 12_345, 1.2e6)] == ["950", "12.3k", "1.2M"]
    assert [units.size(value) for value in (512, 1536, 20 * 2**20)] == ["512 B", "1.5 KiB", "20.0 MiB"]
    assert units.one_line("a\nb\x1b[0m", 20) == "a\\nb\\x1b[0m"
    assert units.one_line("abcdef", 4) == "abc…"
