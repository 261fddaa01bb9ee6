"""SDK: launch and follow jobs, and talk to a served model, from Python.

    import surogate

    with surogate.Client("localhost:50051") as client:
        job = client.create_job(surogate.job_config("sft", train="train.yaml"))
        for event in client.watch(job.name):
            if event.HasField("step_completed"):
                print(event.step_completed.step, event.step_completed.metrics["loss"])
        print(client.get_job(job.name).output_dir)

Jobs, events and the like are the messages of the contract (`surogate.v1.job_pb2`), as any gRPC client sees them.
Errors are `surogate.errors`. Neither torch nor vLLM is imported.
"""

from surogate.client.aio import AsyncClient
from surogate.client.jobs import ENDED, has_ended, job_config, job_name, state_name
from surogate.client.sync import Client
from surogate.rpc.channel import ClientSecurity

__all__ = [
    "ENDED",
    "AsyncClient",
    "Client",
    "ClientSecurity",
    "has_ended",
    "job_config",
    "job_name",
    "state_name",
]
