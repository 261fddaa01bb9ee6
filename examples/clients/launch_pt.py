"""Launches a pretraining job and follows it to its end, with nothing but the generated stubs and grpcio.

    python launch_pt.py HOST:PORT MODEL TEXT_FILE [MAX_STEPS]

MODEL and TEXT_FILE (.jsonl with a column `text`) are paths on the orchestrator's machine. A bearer token, where the
orchestrator wants one, is read from SUROGATE_TOKEN.
"""

import os
import sys
import uuid

import grpc
from google.protobuf.struct_pb2 import Struct

from surogate.v1 import job_pb2, job_pb2_grpc


def main() -> int:
    target, model, text_file = sys.argv[1:4]
    max_steps = int(sys.argv[4]) if len(sys.argv) > 4 else 20
    config = Struct()
    config.update(
        {
            "kind": "pt",
            "train": {
                "model": model,
                "max_steps": max_steps,
                "sequence_len": 256,
                "datasets": [{"path": text_file, "type": "text"}],
                "output_dir": f"output/pt-{uuid.uuid4().hex[:8]}",
                "optimizer": "adamw",
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
        for event in jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name), metadata=metadata):
            kind = event.WhichOneof("event")
            if kind == "step_completed":
                step = event.step_completed
                print(f"step {step.step}/{step.max_steps}: loss {step.metrics['loss']:.4f}")
            elif kind == "state_changed":
                print(job_pb2.Job.State.Name(event.state_changed.state), event.state_changed.status_message)
        job = jobs.GetJob(job_pb2.GetJobRequest(name=job.name), timeout=60, metadata=metadata)
    if job.state != job_pb2.Job.STATE_SUCCEEDED:
        print(f"failed: {job.error.message}", file=sys.stderr)
        return 1
    print(f"the model is in {job.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
