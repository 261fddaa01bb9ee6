"""`surogate jobs …`: what runs on an orchestrator."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from surogate.cli import units
from surogate.cli.console import write_foreign
from surogate.cli.exits import OK, reaching, usage
from surogate.cli.running.launch import START_ORCHESTRATOR, follow_remote
from surogate.client import Client, state_name
from surogate.client.jobs import kind_name
from surogate.rpc.status import from_status
from surogate.v1 import job_pb2
from surogate.visible import visible


def list_jobs(server: str, *, states: list[str], kinds: list[str], labels: list[str], limit: int, as_json: bool) -> int:
    """Prints the jobs that match, newest first."""
    wanted_states = [job_pb2.Job.State.Value(_enum(job_pb2.Job.State.keys(), text, "--state")) for text in states]
    wanted_kinds = [job_pb2.Job.Kind.Value(_enum(job_pb2.Job.Kind.keys(), text, "--kind")) for text in kinds]
    with Client(server) as client, reaching("orchestrator", server, START_ORCHESTRATOR):
        found = client.list_jobs(states=wanted_states, kinds=wanted_kinds, labels=parse_labels(labels))
        jobs = [job for job, _ in zip(found, range(limit), strict=False)]
    if as_json:
        _print_json_lines(jobs)
    else:
        _print_table(jobs)
    return OK


def get_job(server: str, job: str, *, as_json: bool) -> int:
    """Prints one job."""
    with Client(server) as client, reaching("orchestrator", server, START_ORCHESTRATOR):
        found = client.get_job(job)
    if as_json:
        sys.stdout.write(MessageToJson(found, preserving_proto_field_name=True) + "\n")
        return OK
    facts = list(_facts(found))
    width = max(len(key) for key, _ in facts)
    for key, value in facts:
        sys.stdout.write(f"{key.ljust(width)}  {visible(value)}\n")
    return OK


def watch_job(server: str, job: str, *, after_sequence: int, as_json: bool) -> int:
    """Follows a job to its end; with `as_json` an event a line."""
    if not as_json:
        return follow_remote(server, job, after_sequence=after_sequence)
    with Client(server) as client, reaching("orchestrator", server, START_ORCHESTRATOR):
        for event in client.watch(job, after_sequence=after_sequence):
            _print_json_lines([event])
    return OK


def cancel_job(server: str, job: str) -> int:
    """Asks a job to stop."""
    with Client(server) as client, reaching("orchestrator", server, START_ORCHESTRATOR):
        found = client.cancel_job(job)
    sys.stdout.write(f"{found.name}: {state_name(found.state)}\n")
    return OK


def replace_reward(
    server: str, job: str, address: str, *, environment: str, shadow: bool, tls: bool, token_env: str
) -> int:
    """Gives a running job another reward service, or a shadow."""
    with Client(server) as client, reaching("orchestrator", server, START_ORCHESTRATOR):
        found = client.replace_reward(
            job, address, environment=environment, shadow=shadow, tls=tls, token_env=token_env
        )
    what = "the shadow" if shadow else "the reward service"
    sys.stdout.write(f"{found.name}: {what} is {address or ('off' if shadow else 'the configured one')} from now on\n")
    return OK


def scale_job(server: str, job: str, *, inference: int) -> int:
    """Gives a running job more or fewer inference replicas."""
    with Client(server) as client, reaching("orchestrator", server, START_ORCHESTRATOR):
        found = client.scale_job(job, inference=inference)
    replicas = "replica" if inference == 1 else "replicas"
    sys.stdout.write(f"{found.name}: {inference} inference {replicas} from now on\n")
    return OK


def print_logs(server: str, job: str, *, component: str, tail: int, follow: bool) -> int:
    """Prints what the workers of a job have written."""
    with Client(server) as client, reaching("orchestrator", server, START_ORCHESTRATOR):
        for line in client.logs(job, component=component, tail_lines=tail, follow=follow):
            write_foreign(f"{line.worker} | {line.text}\n")
    return OK


def delete_job(server: str, job: str) -> int:
    """Forgets an ended job."""
    with Client(server) as client, reaching("orchestrator", server, START_ORCHESTRATOR):
        client.delete_job(job)
    return OK


def parse_labels(labels: Iterable[str]) -> dict[str, str]:
    """`["a=b"]` as a mapping. Raises InvalidInputError for what has no `=`."""
    pairs = [label.partition("=") for label in labels]
    for key, equals, value in pairs:
        if not key or not equals:
            raise usage("--label", f"{key + value!r} is not KEY=VALUE")
    return {key: value for key, _, value in pairs}


def _enum(names: Sequence[str], text: str, flag: str) -> str:
    """The name of the enum value that people write as `text`: STATE_RUNNING for `running`."""
    known = {name.partition("_")[2].lower(): name for name in names if not name.endswith("_UNSPECIFIED")}
    if text.lower() not in known:
        raise usage(flag, f"{text!r} is none of {', '.join(known)}")
    return known[text.lower()]


def _print_json_lines(messages: Iterable[Message]) -> None:
    for message in messages:
        sys.stdout.write(MessageToJson(message, preserving_proto_field_name=True, indent=None) + "\n")
    sys.stdout.flush()


def _print_table(jobs: list[job_pb2.Job]) -> None:
    rows = [("JOB", "KIND", "STATE", "STEP", "CREATED (UTC)", "STATUS")]
    for job in jobs:
        step = f"{job.step}/{job.max_steps}" if job.max_steps else str(job.step)
        created = job.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")
        status = units.one_line(job.status_message, 60)
        rows.append((job.name.removeprefix("jobs/"), kind_name(job.kind), state_name(job.state), step, created, status))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _facts(job: job_pb2.Job) -> Iterable[tuple[str, str]]:
    yield "job", job.name
    yield "kind", kind_name(job.kind)
    yield "state", state_name(job.state)
    # The status message of a failed job only repeats the error.
    yield ("error", str(from_status(job.error))) if job.HasField("error") else ("status", job.status_message)
    yield "step", f"{job.step}" + (f" of {job.max_steps}" if job.max_steps else "")
    if job.HasField("eta"):
        yield "eta", units.clock(job.eta.ToTimedelta().total_seconds())
    for key in ("create_time", "start_time", "end_time"):
        if job.HasField(key):
            yield key, getattr(job, key).ToJsonString()
    yield "output_dir", job.output_dir
    if job.checkpoint:
        yield "checkpoint", job.checkpoint
    for key, value in sorted(job.labels.items()):
        yield "label", f"{key}={value}"
    for worker in job.workers:
        says = f": {worker.status_message}" if worker.status_message else ""
        yield "worker", f"{worker.component} {worker.index} at {worker.address}, {worker.restarts} restarts{says}"
    for name, number in sorted(job.metrics.items()):
        yield name, f"{number:.6g}"
    for warning in job.warnings:
        yield "warning", warning
