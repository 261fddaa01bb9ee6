"""Launches a LoRA fine-tuning job and follows it over lost connections, with the generated stubs alone.

    python launch_sft.py HOST:PORT MODEL CONVERSATIONS [MAX_STEPS]

MODEL and CONVERSATIONS (.jsonl with a column `messages`) are paths on the orchestrator's machine. A bearer token, where
the orchestrator wants one, is read from SUROGATE_TOKEN.
"""

import os
import sys
import time
import uuid

import grpc
from google.protobuf.struct_pb2 import Struct

from surogate.v1 import job_pb2, job_pb2_grpc


def follow(jobs: job_pb2_grpc.JobServiceStub, name: str, metadata: list[tuple[str, str]]) -> job_pb2.Job:
    """Prints the job's events, each once, and returns the job when it has ended."""
    sequence = 0
    while True:
        try:
            request = job_pb2.WatchJobRequest(name=name, after_sequence=sequence)
            for event in jobs.WatchJob(request, metadata=metadata):
                sequence = event.sequence
                if event.HasField("step_completed"):
                    step = event.step_completed
                    print(f"step {step.step}/{step.max_steps}: loss {step.metrics['loss']:.4f}")
            job = jobs.GetJob(job_pb2.GetJobRequest(name=name), timeout=60, metadata=metadata)
            if job.HasField("end_time"):
                return job
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
        time.sleep(1)  # the server went away: go on after the last event that came


def main() -> int:
    target, model, conversations = sys.argv[1:4]
    max_steps = int(sys.argv[4]) if len(sys.argv) > 4 else 20
    config = Struct()
    config.update(
        {
            "kind": "sft",
            "train": {
                "model": model,
                "max_steps": max_steps,
                "sequence_len": 256,
                "datasets": [{"path": conversations, "type": "conversation"}],
                "output_dir": f"output/sft-{uuid.uuid4().hex[:8]}",
                "optimizer": "adamw",
                "lora": True,
                "lora_rank": 8,
                "lora_alpha": 16,
            },
        }
    )
    token = os.environ.get("SUROGATE_TOKEN")
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(target) as channel:
        jobs = job_pb2_grpc.JobServiceStub(channel)
        request = job_pb2.CreateJobRequest(config=config, request_id=uuid.uuid4().hex)
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
    print(f"the adapter is in {job.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
