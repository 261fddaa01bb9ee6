"""JobService: the contract of proto/surogate/v1/job.proto on top of the store and the runner."""

# ruff: noqa: N802 - the methods have the names of the contract

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty
from sqlalchemy import Connection, Row
from sqlalchemy.exc import IntegrityError

from orchestrator_svc.allowed import check_inputs, check_remote_code, check_variables
from orchestrator_svc.custom_code import check_allowed
from orchestrator_svc.jobs.runner import JobRunner
from orchestrator_svc.jobstore import store
from orchestrator_svc.jobstore.bell import Bell
from orchestrator_svc.jobstore.database import Database
from orchestrator_svc.jobstore.journal import read_events
from orchestrator_svc.jobstore.messages import ENDED, KINDS, to_job
from orchestrator_svc.jobstore.reward_services import replace_service
from orchestrator_svc.jobstore.scaling import check_scale, set_scale
from orchestrator_svc.launchers.kubernetes.names import OUR_LABELS
from orchestrator_svc.launchers.kubernetes.policy import check_cluster, check_image
from orchestrator_svc.paths import check_output, check_paths, check_urls, output_dir_of
from orchestrator_svc.replace_reward import check_service, wanted_service
from orchestrator_svc.settings import OrchestratorSettings
from orchestrator_svc.worker_logs import read_logs
from surogate.config.job import AnyJob, resolve_job
from surogate.errors import ConfigError, InvalidInputError, OutOfRangeError, PermissionDeniedError, Violation
from surogate.rpc.caller import caller
from surogate.structs import from_struct
from surogate.telemetry.log import get_logger
from surogate.urls import is_url
from surogate.v1 import job_pb2, job_pb2_grpc

SERVICE = "surogate.v1.JobService"

_log = get_logger("orchestrator")

_JOB_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DEFAULT_PAGE, _MAX_PAGE = 50, 1000
_MAX_REQUEST_ID = 128
_MAX_CONFIG_BYTES = 1 << 20
_MAX_PAGE_BYTES = 3 << 20
"""Of the jobs on a page: gRPC's clients take messages of 4 MiB unless they were told otherwise."""
_DEFAULT_TAIL, _MAX_TAIL = 100, 10_000
OWNER = "surogate.dev/created-by"
"""Label of a job whose client had a named token."""
_MAX_LABELS, _MAX_LABEL_LENGTH = 64, 255
_WATCH_BATCH = 256
_WATCH_POLL_SECONDS = 1.0
"""How often a watcher looks for events that another orchestrator on the same store has written."""


class JobServicer(job_pb2_grpc.JobServiceServicer):
    """Answers clients. What it accepts is in the store before it answers; the runner does the rest."""

    def __init__(self, settings: OrchestratorSettings, database: Database, runner: JobRunner, bell: Bell) -> None:
        self._settings = settings
        self._database = database
        self._runner = runner
        self._bell = bell

    async def CreateJob(self, request: job_pb2.CreateJobRequest, context: Any) -> job_pb2.Job:
        _check_request(request, reserved=context is not None)
        if name := caller():
            request.labels[OWNER] = name
        given = from_struct(request.config)
        request_digest = store.digest(given, request.job_id, dict(request.labels))
        if request.request_id and not request.validate_only:
            # A repeat gives back its job even if the configuration would be refused today (a file that has gone).
            row = await self._database.read(lambda c: store.find_request(c, request.request_id, request_digest))
            if row is not None:
                return await self._show(row)
        new = await asyncio.to_thread(self._resolve, given, request, request_digest)
        if request.validate_only:
            return _preview(new, request.job_id)
        row = await self._insert(new)
        _log.info("job made", job=new.job_id)
        self._bell.ring(new.job_id)
        self._runner.wake()
        return await self._show(row)

    async def GetJob(self, request: job_pb2.GetJobRequest, context: Any) -> job_pb2.Job:
        job_id = job_id_of(request.name)
        return await self._show(await self._database.read(lambda c: store.get(c, job_id)))

    async def ListJobs(self, request: job_pb2.ListJobsRequest, context: Any) -> job_pb2.ListJobsResponse:
        if not 0 <= request.page_size <= _MAX_PAGE:
            why = f"is {request.page_size}; it must be 1 to {_MAX_PAGE}, or 0 for {_DEFAULT_PAGE}"
            raise InvalidInputError(f"page_size {why}", violations=[Violation("page_size", why)])
        states, kinds = sorted(set(request.states)), sorted(set(request.kinds))
        unknown = [*_unknown("states", states, job_pb2.Job.State), *_unknown("kinds", kinds, job_pb2.Job.Kind)]
        _refuse([*unknown, *_label_violations(request.labels)])
        filters: dict[str, Any] = {
            "states": states,
            "kinds": kinds,
            "labels": dict(request.labels),
        }
        size = request.page_size or _DEFAULT_PAGE
        rows, token = await self._database.read(
            lambda c: store.list_page(c, page_size=size, page_token=request.page_token, **filters)
        )
        page = job_pb2.ListJobsResponse(next_page_token=token)
        num_bytes = 0
        for index, row in enumerate(rows):
            job = to_job(row)
            num_bytes += job.ByteSize()
            if num_bytes > _MAX_PAGE_BYTES and index:
                page.next_page_token = store.page_after(rows[index - 1], **filters)
                break
            page.jobs.append(job)
        return page

    async def WatchJob(self, request: job_pb2.WatchJobRequest, context: Any) -> AsyncIterator[job_pb2.JobEvent]:
        job_id = job_id_of(request.name)
        sent = request.after_sequence
        if sent < 0:
            why = f"is {sent}; it must be 0, for the first event, or more"
            raise InvalidInputError(f"after_sequence {why}", violations=[Violation("after_sequence", why)])
        row = await self._database.read(lambda c: store.get(c, job_id))
        if sent > row.last_sequence:
            raise OutOfRangeError(
                f"after_sequence is {sent}, and jobs/{job_id} has had {row.last_sequence} events",
                reason="SEQUENCE_AHEAD",
            )
        while True:
            news = self._bell.event(job_id)
            batch, ended = await self._database.read(partial(_next_events, job_id=job_id, after=sent))
            for event in batch:
                yield event
                sent = event.sequence
            if ended and len(batch) < _WATCH_BATCH:
                return
            if not batch:
                await _wait(news, _WATCH_POLL_SECONDS)

    async def CancelJob(self, request: job_pb2.CancelJobRequest, context: Any) -> job_pb2.Job:
        job_id = job_id_of(request.name)
        await self._require_own(job_id, "cancelled")
        row = await self._database.write(lambda c: store.request_cancel(c, job_id))
        self._bell.ring(job_id)
        self._runner.cancel(job_id)
        return await self._show(row)

    async def ReplaceReward(self, request: job_pb2.ReplaceRewardRequest, context: Any) -> job_pb2.Job:
        job_id = job_id_of(request.name)
        row = await self._require_own(job_id, "given another reward service")
        check_variables({"token_env": request.token_env}, self._settings.token_variables)
        service, needed = wanted_service(row, request)
        if service.address:
            await check_service(service, needed)
        await self._database.write(lambda c: replace_service(c, job_id, service))
        self._bell.ring(job_id)
        return await self._show(await self._database.read(lambda c: store.get(c, job_id)))

    async def ScaleJob(self, request: job_pb2.ScaleJobRequest, context: Any) -> job_pb2.Job:
        job_id = job_id_of(request.name)
        row = await self._require_own(job_id, "scaled")
        check_scale(row, request.inference, self._settings)
        await self._database.write(lambda c: set_scale(c, job_id, request.inference))
        self._bell.ring(job_id)
        return await self._show(row)

    async def ReadLogs(self, request: job_pb2.ReadLogsRequest, context: Any) -> AsyncIterator[job_pb2.LogLine]:
        job_id = job_id_of(request.name)
        if not 0 <= request.tail_lines <= _MAX_TAIL:
            why = f"is {request.tail_lines}; it must be 1 to {_MAX_TAIL}, or 0 for {_DEFAULT_TAIL}"
            raise InvalidInputError(f"tail_lines {why}", violations=[Violation("tail_lines", why)])
        row = await self._database.read(lambda c: store.get(c, job_id))
        pool, tail = self._runner.pool_of(job_id), request.tail_lines or _DEFAULT_TAIL
        async with aclosing(read_logs(pool, Path(row.output_dir), request.component, tail, request.follow)) as lines:
            async for line in lines:
                yield line

    async def DeleteJob(self, request: job_pb2.DeleteJobRequest, context: Any) -> Empty:
        job_id = job_id_of(request.name)
        await self._require_own(job_id, "deleted")
        await self._database.write(lambda c: store.forget(c, job_id))
        self._bell.ring(job_id)
        return Empty()

    async def _require_own(self, job_id: str, done: str) -> Row[Any]:
        """The row of a job that the caller may change: a client with a named token its own, others any.

        Raises NotFoundError, PermissionDeniedError.
        """
        row: Row[Any] = await self._database.read(lambda c: store.get(c, job_id))
        name, owner = caller(), row.labels.get(OWNER, "")
        if name and name != owner:
            whose = f"was created by {owner}" if owner else "was not created with a named token"
            raise PermissionDeniedError(f"jobs/{job_id} {whose}: it cannot be {done} by {name}", reason="NOT_YOUR_JOB")
        _log.info("job is to be changed", job=job_id, change=done)
        return row

    async def _show(self, row: Row[Any]) -> job_pb2.Job:
        job = to_job(row)
        if row.state == job_pb2.Job.STATE_QUEUED:
            ahead = await self._database.read(lambda c: store.jobs_ahead(c, row))
            job.status_message = f"waiting for its turn: number {ahead + 1} in the queue"
        return job

    async def _insert(self, new: store.NewJob) -> Row[Any]:
        def insert(connection: Connection) -> Row[Any]:
            return store.create(connection, new, self._settings.max_queued_jobs)

        try:
            return await self._database.write(insert)
        except IntegrityError:  # another orchestrator inserted the same id in this moment: now it is seen
            return await self._database.write(insert)

    def _resolve(self, given: dict[str, Any], request: job_pb2.CreateJobRequest, request_digest: str) -> store.NewJob:
        """Everything about the job to be, checked. Raises ConfigError. Runs in a thread: it may look at files."""
        resolved = resolve_job(given)
        root = self._settings.output_root
        restricted = self._settings.restrict_paths
        if root is not None and (restricted or restricted is None):
            check_paths(given, root)
        if self._settings.input_roots:
            check_inputs(given, [*self._settings.input_roots, *([root] if root else [])])
        check_variables(given, self._settings.token_variables)
        check_remote_code(given, self._settings.custom_modules)
        if self._settings.allowed_urls:
            check_urls(given, self._settings.allowed_urls)
        if resolved.kind == "grpo" and resolved.orch.advantage.import_path:
            path = resolved.orch.advantage.import_path
            check_allowed(path, self._settings.custom_modules, "orch.advantage.import_path")
        warnings = [*resolved.warnings, *self._check_cluster(resolved)]
        job_id = request.job_id or make_job_id(resolved.kind)
        output_dir = output_dir_of(given, resolved, root, job_id)
        check_output(output_dir, resolved.train.model)
        config = resolved.to_dict()
        _anchor_checkpoints(config, root)
        return store.NewJob(
            job_id=job_id,
            kind=KINDS[resolved.kind],
            config=config,
            warnings=warnings,
            labels=dict(request.labels),
            output_dir=str(output_dir),
            request_id=request.request_id,
            request_digest=request_digest,
            max_steps=max(0, resolved.train.max_steps),
        )

    def _check_cluster(self, job: AnyJob) -> list[str]:
        """Makes sure that the job asks for nothing that it may not have; returns what its author should know."""
        self._check_images(job)
        self._check_replicas(job)
        if job.cluster is None:
            return []
        if self._settings.launcher != "kubernetes":
            return [f"cluster: has no effect here: the launcher is {self._settings.launcher}, not kubernetes"]
        check_cluster(job.cluster, self._settings)
        return []

    def _check_replicas(self, job: AnyJob) -> None:
        """Makes sure that a job begins with no more replicas than it could be scaled to."""
        if job.kind != "grpo" or self._settings.launcher == "static" or job.infer.dp <= self._settings.max_replicas:
            return
        why = (
            f"is {job.infer.dp}; this server gives a job {self._settings.max_replicas} replicas at most (max_replicas)"
        )
        raise ConfigError.of([Violation("infer.dp", why)])

    def _check_images(self, job: AnyJob) -> None:
        """Makes sure that reward services of the author's own can be run, and may be."""
        if job.kind != "grpo":
            return
        evaluated = job.orch.eval.env if job.orch.eval else []
        keyed = [(f"orch.env.{i}.image", env.image) for i, env in enumerate(job.orch.env)]
        keyed += [(f"orch.eval.env.{i}.image", env.image) for i, env in enumerate(evaluated)]
        for key, image in keyed:
            if image and self._settings.launcher != "kubernetes":
                why = f"needs the launcher kubernetes, not {self._settings.launcher}: run it, and give its address"
                raise ConfigError.of([Violation(key, why)])
            if image:
                check_image(image, key, self._settings)


def job_id_of(name: str) -> str:
    """The id in `jobs/{job_id}`. Raises InvalidInputError."""
    prefix, _, job_id = name.partition("/")
    if prefix != "jobs" or not _JOB_ID.fullmatch(job_id):
        why = f"{name!r} is not a job's name, which looks like jobs/my-job"
        raise InvalidInputError(why, violations=[Violation("name", why)])
    return job_id


def make_job_id(kind: str) -> str:
    """A new id that says what and when: `sft-20260101-093000-1f2e`."""
    return f"{kind}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def _check_request(request: job_pb2.CreateJobRequest, *, reserved: bool) -> None:
    """`reserved`: whether labels of our own are refused, as they are from clients."""
    violations = []
    if request.job_id and not _JOB_ID.fullmatch(request.job_id):
        why = f"{request.job_id!r} must be lowercase letters, digits and inner hyphens, 1 to 63 characters"
        violations.append(Violation("job_id", why))
    if len(request.request_id) > _MAX_REQUEST_ID or "\0" in request.request_id:
        why = f"must be at most {_MAX_REQUEST_ID} characters, and none of them U+0000"
        violations.append(Violation("request_id", why))
    if (size := request.config.ByteSize()) > _MAX_CONFIG_BYTES:
        why = f"has {size} bytes, more than {_MAX_CONFIG_BYTES}: put data into files, and their paths here"
        violations.append(Violation("config", why))
    ours = [key for key in request.labels if reserved and key.startswith(OUR_LABELS)]
    violations += [Violation(f"labels.{key[:64]}", f"must not begin with {OUR_LABELS}, as ours do") for key in ours]
    _refuse([*violations, *_label_violations(request.labels)])


def _label_violations(labels: Mapping[str, str]) -> list[Violation]:
    if len(labels) > _MAX_LABELS:
        return [Violation("labels", f"are more than {_MAX_LABELS}")]
    why = f"must have a key, be at most {_MAX_LABEL_LENGTH} characters long, and have no character U+0000"
    wrong = [k for k, v in labels.items() if not k or max(len(k), len(v)) > _MAX_LABEL_LENGTH or "\0" in k + v]
    return [Violation(f"labels.{key[:64]}", why) for key in wrong]


def _unknown(field: str, numbers: Sequence[int], enum: Any) -> list[Violation]:
    """What is none of the values of an enum of the contract; not said (0) is none either."""
    names = ", ".join(f"{name} ({number})" for name, number in enum.items() if number)
    wrong = [number for number in numbers if not number or number not in enum.values()]
    return [Violation(field, f"has {number}, which is none of {names}") for number in wrong]


def _refuse(violations: list[Violation]) -> None:
    if violations:
        raise InvalidInputError("\n".join(map(str, violations)), violations=violations)


def _anchor_checkpoints(config: dict[str, Any], root: Path | None) -> None:
    """A relative checkpoint_dir starts where a relative output_dir does, wherever the trainer runs."""
    train = config["train"]
    if train.get("checkpoint_dir") and not is_url(train["checkpoint_dir"]):
        train["checkpoint_dir"] = str(((root or Path()) / Path(train["checkpoint_dir"]).expanduser()).resolve())


def _preview(new: store.NewJob, job_id: str) -> job_pb2.Job:
    job = job_pb2.Job(
        name=f"jobs/{job_id}" if job_id else "",
        kind=new.kind,  # type: ignore[arg-type]
        output_dir=new.output_dir,
        max_steps=new.max_steps,
        labels=new.labels,
        warnings=new.warnings,
    )
    job.config.update(new.config)
    return job


def _next_events(connection: Connection, job_id: str, after: int) -> tuple[Sequence[job_pb2.JobEvent], bool]:
    """The next events, and whether the job has ended, as of one moment."""
    row = store.get(connection, job_id)
    return read_events(connection, job_id, after, _WATCH_BATCH), row.state in ENDED


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
