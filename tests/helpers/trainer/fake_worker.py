"""A training worker without a model: speaks the worker protocol, and misbehaves when it is told to.

What it does in `open` and `run` is said by the last part of `train.model`, in a step by the id of the first sample.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from surogate.errors import ConfigError, InvalidInputError, Violation
from surogate.internal.v1 import worker_pb2 as worker
from surogate.v1 import trainer_pb2 as trainer
from surogate.v1 import weights_pb2 as weights
from trainer_svc.worker_protocol import Reporter, WorkerServer

COMMAND = (sys.executable, "-m", "tests.helpers.trainer.fake_worker")
VOCAB_SIZE = 100
MAX_SEQUENCE_LENGTH = 64


class FakeEngine:
    """Counts steps. A step's loss is the sum of its advantages; `state` counts how often a step was really done."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._done = 0
        self._saved = 0
        self._mode = ""
        self._output = Path()
        self._max_steps = 0

    def open(self, session: trainer.CreateSessionRequest) -> worker.OpenReply:
        train = dict(session.config)["train"]
        self._mode = Path(train["model"]).name
        self._output = Path(session.output_dir)
        self._max_steps = int(train["max_steps"])
        if self._mode == "no-model":
            raise ConfigError.of([Violation("train.model", "has no weights")])
        if self._mode == "loads-forever":
            _hang()
        if self._mode == "dies-loading":
            sys.stdout.write("allocating far too much\n")
            _die()
        if session.resume_from:
            self._done = self._saved = int(Path(session.resume_from).name.removeprefix("checkpoint-"))
        return worker.OpenReply(
            step=self._done,
            max_steps=self._max_steps,
            checkpoint=session.resume_from,
            checkpoint_step=self._saved,
            num_parameters=1000,
            num_trainable_parameters=10,
            vocab_size=VOCAB_SIZE,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
        )

    def run(self) -> worker.RunReply:
        if self._mode == "warns":
            self._reporter.warning("the learning rate is high")
        while self._done < self._max_steps:
            if self._reporter.stop_requested:
                return worker.RunReply(stopped=True)
            time.sleep(0.01)
            self._done += 1
            self._reporter.step(self._done, {"loss": 1 / self._done})
            if self._mode == "crashes" and self._done == 2:
                raise RuntimeError("the optimiser fell over")
        self._reporter.evaluation(self._done, {"eval/loss": 0.5})
        self._save(final=True)
        return worker.RunReply()

    def train_step(self, step: int, samples: Sequence[trainer.TrainingSample]) -> Mapping[str, float]:
        assert step == self._done + 1
        (self._output / f"begun-{step}").touch()
        match samples[0].sample_id.partition("-")[0]:
            case "die":
                sys.stderr.write("last words\n")
                _die()
            case "crash":
                raise RuntimeError("the optimiser fell over")
            case "refuse":
                raise InvalidInputError("this sample cannot be trained on")
            case "hang":
                _hang()
            case "slow":
                time.sleep(0.5)
            case "fork":  # a grandchild that keeps the pipes and the socket open
                subprocess.Popen(["sleep", "600"], close_fds=False)
                _die()
        self._done = step
        with (self._output / "trained").open("a") as file:
            file.write(f"{step} {' '.join(sample.sample_id for sample in samples)}\n")
        return {"loss": sum(sample.advantage for sample in samples), "pid": os.getpid()}

    def export_weights(self, version: int, directory: str) -> worker.ExportWeightsReply:
        with (self._output / "exported").open("a") as file:
            file.write(f"{version}\n")
        path = Path(directory) / "weights.safetensors"
        path.write_bytes(b"weights of step %d" % self._done)
        manifest = weights.WeightManifest(version=version, kind=weights.WEIGHT_KIND_LORA, num_bytes=path.stat().st_size)
        return worker.ExportWeightsReply(path=str(path), manifest=manifest)

    def checkpoint(self, final: bool) -> trainer.TrainerCheckpoint:
        path = self._output / f"checkpoint-{self._done}"
        path.mkdir(parents=True, exist_ok=True)
        self._saved = self._done
        return trainer.TrainerCheckpoint(step=self._done, path=str(path), final=final)

    def compute_logprobs(self, request: trainer.ComputeLogprobsRequest) -> trainer.ComputeLogprobsResponse:
        response = trainer.ComputeLogprobsResponse()
        for sequence in request.sequences:
            response.sequences.add(logprobs=[-float(self._done)] * (len(sequence.ids) - 1))
        return response

    def stop(self, save: bool) -> None:
        if self._mode == "never-stops":
            _hang()
        if save and self._saved != self._done:
            self._save(final=False)

    def _save(self, *, final: bool) -> None:
        saved = self.checkpoint(final)
        self._reporter.checkpoint(saved.step, saved.path, final=final)


def _die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    threading.Event().wait()


def main() -> int:
    """Serves one session."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    server = WorkerServer(parser.parse_args().fd)
    return server.serve(FakeEngine(server))


if __name__ == "__main__":
    sys.exit(main())
