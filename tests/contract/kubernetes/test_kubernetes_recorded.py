"""What a real API server (1.36) answered: the fake one answers the same, and the launcher makes the same of both."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

pytest.importorskip("kubernetes", reason="needs the extra `kubernetes`")

from orchestrator_svc.launchers.kubernetes import words
from orchestrator_svc.launchers.kubernetes.answers import ExpiredError
from orchestrator_svc.launchers.kubernetes.api import JOB, POD, Api
from orchestrator_svc.launchers.kubernetes.mirror import Mirror
from surogate.errors import AlreadyExistsError, InvalidInputError, NotFoundError, PermissionDeniedError, SurogateError
from tests.helpers.cluster.kube import write_kubeconfig
from tests.helpers.cluster.kube_server import ApiServer, Object
from tests.helpers.waiting import PATIENCE

FOLDER = Path(__file__).parents[2] / "data" / "kubernetes"
READ: set[str] = set()


def recorded(name: str) -> Any:
    READ.add(name)
    return json.loads((FOLDER / f"{name}.json").read_text())


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[ApiServer, aiohttp.ClientSession, str]]:
    """A fake API server, a way to call it, and where its Jobs are."""
    async with ApiServer("contract").serving() as server, aiohttp.ClientSession() as session:
        yield server, session, f"{server.url}/apis/batch/v1/namespaces/contract/jobs"


STRICT = {"fieldValidation": "Strict"}


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("job-create-201", STRICT),
        ("job-fail-create", STRICT),
        ("job-unschedulable-create", STRICT),
        ("job-suspended-create", STRICT),
        ("job-create-201-warn-unknown", {}),
        ("job-create-400-strict", STRICT),
        ("job-create-403-rbac", STRICT),
        ("job-create-409", STRICT),
        ("job-create-422-fraction-gpu", STRICT),
        ("job-create-422-restart", STRICT),
    ],
)
async def test_the_fake_takes_and_refuses_what_the_real_one_did(name: str, query: dict[str, str]) -> None:
    exchange = recorded(name)
    async with serving() as (server, session, url):
        if name == "job-create-409":
            await session.post(url, json=exchange["request"])
        if name == "job-create-403-rbac":
            server.forbidden["jobs"] = exchange["body"]["message"]
        async with session.post(url, json=exchange["request"], params=query) as answer:
            said = await answer.json()
            assert answer.status == exchange["status"]
        for key in ("kind", "apiVersion", "reason", "message", "code"):
            assert said.get(key) == exchange["body"].get(key), key
        if answer.status == 201:
            assert said["spec"]["suspend"] == exchange["body"]["spec"]["suspend"]
            assert "nope" not in said["spec"], "what it does not know it drops"


async def test_the_fake_finds_changes_and_deletes_as_the_real_one_did() -> None:
    made, missing = recorded("job-create-201"), recorded("job-get-404")
    async with serving() as (server, session, url):
        async with session.get(f"{url}/absent") as answer:
            assert (answer.status, (await answer.json())["message"]) == (404, missing["body"]["message"])
        await session.post(url, json=made["request"])
        immutable = recorded("job-immutable-422")
        change = {"spec": {"template": {"spec": {"containers": []}}}}
        async with session.patch(f"{url}/ok", json=change) as answer:
            said = await answer.json()
            assert (answer.status, said["reason"]) == (422, immutable["body"]["reason"])
            assert said["message"].startswith('Job.batch "ok" is invalid: spec.template: Invalid value: ')
            assert immutable["body"]["message"].startswith('Job.batch "ok" is invalid: spec.template: Invalid value: ')
            assert said["message"].endswith("field is immutable") == immutable["body"]["message"].endswith("immutable")
        resumed = recorded("job-unsuspend-patch")
        async with session.patch(f"{url}/ok", json=resumed["request"]) as answer:
            assert (answer.status, (await answer.json())["spec"]["suspend"]) == (
                200,
                resumed["body"]["spec"]["suspend"],
            )
        server.expire()
        expired = recorded("watch-expired-410")
        async with session.get(url, params={"watch": "true", "resourceVersion": "1"}) as answer:
            said = await answer.json()
            assert (answer.status, said["reason"], said["message"]) == (
                expired["status"],
                expired["body"]["reason"],
                expired["body"]["message"],
            )


@pytest.mark.parametrize(("policy", "orphaned"), [(None, True), ("Foreground", False)])
async def test_a_deletion_of_the_fake_leaves_what_the_real_one_left(policy: str | None, orphaned: bool) -> None:
    """Without a policy the pod stays, and belongs to nobody; with one it goes, and the Job after it."""
    left = recorded("pods-after-delete-no-policy" if orphaned else "pods-after-foreground")["body"]["items"]
    answered = recorded("job-delete-default-api" if orphaned else "job-delete-foreground")
    async with serving() as (server, session, url):
        async with session.post(url, json=recorded("job-create-201")["request"]) as answer:
            owner = {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "name": "ok",
                "uid": (await answer.json())["metadata"]["uid"],
            }
        server.add("pods", {"metadata": {"name": "ok-1", "ownerReferences": [owner]}, "spec": {}})
        async with session.delete(f"{url}/ok", params={"propagationPolicy": policy} if policy else {}) as answer:
            assert (answer.status, (await answer.json())["kind"]) == (answered["status"], answered["body"]["kind"])
        if not orphaned:
            assert server.objects["pods"]["ok-1"]["metadata"]["deletionTimestamp"]
            server.remove("pods", "ok-1")  # its node has ended it
        pods = list(server.objects["pods"].values())
        assert len(pods) == len(left)
        for pod in [*pods, *left]:
            assert not pod["metadata"].get("ownerReferences") and not pod["metadata"].get("deletionTimestamp")
        async with session.get(f"{url}/ok") as answer:
            gone = recorded("job-after-foreground-404")
            assert (answer.status, (await answer.json())["message"]) == (404, gone["body"]["message"])


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("job-create-400-strict", InvalidInputError, 'unknown field "spec.nope"'),
        ("job-create-401", PermissionDeniedError, "Unauthorized"),
        ("job-create-403-rbac", PermissionDeniedError, "cannot create resource"),
        ("job-create-409", AlreadyExistsError, "already exists"),
        ("job-create-422-fraction-gpu", InvalidInputError, "must be an integer"),
        ("job-create-422-restart", InvalidInputError, "restartPolicy"),
        ("job-immutable-422", InvalidInputError, "immutable"),
        ("job-get-404", NotFoundError, "not found"),
        ("ns-missing-404", NotFoundError, 'namespaces "absent" not found'),
        ("watch-expired-410", ExpiredError, "too old"),
    ],
)
async def test_the_launcher_tells_the_recorded_refusals_apart(
    tmp_path: Path, name: str, kind: type[SurogateError], text: str
) -> None:
    exchange = recorded(name)
    async with replaying(tmp_path, {}, web.json_response(exchange["body"], status=exchange["status"])) as client:
        with pytest.raises(kind, match=text):
            await client.create(JOB, exchange["request"] or {})


@asynccontextmanager
async def replaying(folder: Path, watches: dict[str, list[Object]], answer: web.Response) -> AsyncIterator[Api]:
    """A client of a server that tells recorded watches once, and else gives one answer."""

    async def handle(request: web.Request) -> web.StreamResponse:
        plural = request.path.rpartition("/")[2]
        if plural not in watches:
            return answer
        if request.query.get("watch") != "true":
            return web.json_response({"metadata": {"resourceVersion": "2165"}, "items": []})
        stream = web.StreamResponse()
        await stream.prepare(request)
        for event in watches[plural]:
            await stream.write(json.dumps(event).encode() + b"\n")
            await asyncio.sleep(0)
        await asyncio.sleep(3600)
        return stream

    application = web.Application()
    application.router.add_route("*", "/{tail:.*}", handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    client = Api(
        "contract", kubeconfig=write_kubeconfig(folder / "kubeconfig", f"http://127.0.0.1:{port}"), patience=60.0
    )
    await client.open()
    try:
        yield client
    finally:
        await client.close()
        await runner.cleanup()


async def test_the_recorded_watches_are_followed_to_their_ends(tmp_path: Path) -> None:
    """Bookmarks whose containers are null among them."""
    jobs, pods = recorded("watch-jobs"), recorded("watch-pods")
    assert jobs[0]["object"]["spec"]["template"]["spec"]["containers"] is None
    streams = {"jobs": jobs, "pods": pods}
    async with replaying(tmp_path, streams, web.json_response({}, status=404)) as client:
        mirror = Mirror(client, "", kinds=(JOB, POD))
        mirror.start()
        try:
            async with asyncio.timeout(PATIENCE):
                while (job := mirror.job("susp")) is None or words.how_ended(job, []) is None or mirror.job("ok"):
                    await mirror.changed().wait()
            assert not mirror.trouble
            assert {one["metadata"]["name"] for one in mirror.items(JOB)} == {"strict", "huge", "dead", "susp"}
            for name in ("dead", "huge", "susp"):
                final = recorded(f"job-final-{name}")["body"]
                assert (mirror.job(name) or {})["status"] == final["status"]
            async with asyncio.timeout(PATIENCE):
                while len(mirror.items(POD)) > 4:
                    await mirror.changed().wait()
            [huge] = mirror.pods(mirror.job("huge") or {})
            assert words.why_waiting(huge) == words.why_waiting(recorded("pods-of-huge")["body"]["items"][0])
        finally:
            await mirror.close()


def test_each_recorded_job_ends_when_its_last_condition_says_so() -> None:
    """FailureTarget and SuccessCriteriaMet come before the end, and are none."""
    seen: dict[str, list[str]] = {}
    for event in recorded("watch-jobs")[1:]:
        end = words.how_ended(event["object"], [])
        seen.setdefault(event["object"]["metadata"]["name"], []).append(end.text if end else "")
    texts = {name: [text for text in dict.fromkeys(told) if text] for name, told in seen.items()}
    assert texts == {
        "ok": ["ended by itself"],
        "strict": ["ended by itself"],
        "susp": ["ended by itself"],
        "fail": ["lost its pod: somebody deleted it, or its node is gone"],
        "dead": ["ran longer than it may (cluster.max_runtime: 3 s)"],
        "huge": [],
    }


def test_every_recording_is_used() -> None:
    """Here or in `tests/unit/kubernetes/test_kubernetes_words.py`."""
    sources = [Path(__file__), Path(__file__).parents[2] / "unit" / "kubernetes" / "test_kubernetes_words.py"]
    text = "".join(file.read_text(encoding="utf-8") for file in sources)
    for file in FOLDER.glob("*.json"):
        final = file.stem.removeprefix("job-final-")
        assert file.stem in text or f'"{final}"' in text, f"{file.name} is read by no test"
