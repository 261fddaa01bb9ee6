"""Launches a job of any kind and follows it to its end, over lost connections, with the generated stubs and grpcio.

    python launch.py HOST:PORT pt train=train.yaml
    python launch.py HOST:PORT sft train=train.yaml
    python launch.py HOST:PORT grpo train=train.yaml infer=infer.yaml orch=orch.yaml

Paths within the files are those of the orchestrator's machine. A bearer token, where the orchestrator wants one, is
read from SUROGATE_TOKEN.
"""

import os
import sys
import time
import uuid
from pathlib import Path

import grpc
import yaml
from google.protobuf.struct_pb2 import Struct

from surogate.v1 import job_pb2, job_pb2_grpc

Metadata = list[tuple[str, str]]


def read(kind: str, files: list[str]) -> Struct:
    """The configuration of the job: its kind, and its files by the names of the parts (`train=train.yaml`)."""
    config = Struct()
    named = (item.split("=", 1) for item in files)
    config.update({"kind": kind, **{part: yaml.safe_load(Path(file).read_text()) for part, file in named}})
    return config


def follow(jobs: job_pb2_grpc.JobServiceStub, name: str, metadata: Metadata) -> job_pb2.Job:
    """Prints the job's events, each once, and returns the job when it has ended."""
    sequence = 0
    while True:
        try:
            request = job_pb2.WatchJobRequest(name=name, after_sequence=sequence)
            for event in jobs.WatchJob(request, metadata=metadata):
                sequence = event.sequence
                show(event)
            job = jobs.GetJob(job_pb2.GetJobRequest(name=name), timeout=60, metadata=metadata)
            if job.HasField("end_time"):
                return job
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
        time.sleep(1)  # the server went away: go on after the last event that came


def show(event: job_pb2.JobEvent) -> None:
    """Prints steps, with what they are about (a GRPO step has a reward, others a loss), and changes of state."""
    if event.HasField("step_completed"):
        step = event.step_completed
        key = "reward/mean" if "reward/mean" in step.metrics else "loss"
        print(f"step {step.step}/{step.max_steps}: {key} {step.metrics[key]:.4f}")
    elif event.HasField("state_changed"):
        print(job_pb2.Job.State.Name(event.state_changed.state), event.state_changed.status_message)


def main() -> int:
    target, kind, *files = sys.argv[1:]
    token = os.environ.get("SUROGATE_TOKEN")
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(target) as channel:
        jobs = job_pb2_grpc.JobServiceStub(channel)
        request = job_pb2.CreateJobRequest(config=read(kind, files), request_id=uuid.uuid4().hex)
        try:
            job = jobs.CreateJob(request, timeout=60, metadata=metadata)
        except grpc.RpcError as error:
            print(f"refused: {error.details()}", file=sys.stderr)
            return 2
        print(f"{job.name} in {job.output_dir}")
        job = follow(jobs, job.name, metadata)
    if job.state != job_pb2.Job.STATE_SUCCEEDED:
        print(f"failed: {job.error.message}", file=sys.stderr)
        return 1
    print(f"the result is in {job.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
