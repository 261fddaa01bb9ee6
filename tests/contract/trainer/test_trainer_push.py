"""Weights from the trainer to replicas: exported once a version, given to whoever asks, also later."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from surogate.errors import (
    FailedPreconditionError,
    InternalError,
    InvalidInputError,
    SurogateError,
    UnavailableError,
)
from surogate.rpc.status import from_status
from surogate.v1 import trainer_pb2 as trainer
from surogate.v1 import weights_pb2 as weights
from surogate.weights.push import PushReport, ReplicaReport
from tests.helpers.trainer.trainer_front import ID, Front, serving


class FakePush:
    """Stands in for `surogate.weights.push.push`: remembers the bytes, fails where it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[str], bytes]] = []
        self.ids: list[str] = []
        self.manifests: list[weights.WeightManifest] = []
        self.fails_commit: set[str] = set()
        self.staging_error: SurogateError | None = None

    async def __call__(
        self, image: str, manifest: weights.WeightManifest, targets: list[str], *, update_id: str
    ) -> PushReport:
        self.calls.append((manifest.version, targets, Path(image).read_bytes()))  # noqa: ASYNC240
        self.ids.append(update_id)
        self.manifests.append(manifest)
        if self.staging_error is not None:
            raise self.staging_error
        replicas = [ReplicaReport(target, pause_seconds=0.01) for target in targets]
        for replica in replicas:
            if replica.target in self.fails_commit:
                replica.error = InternalError("the swap failed")
        return PushReport(manifest.version, manifest.num_bytes, 0.5, replicas)


@pytest.fixture
def sent() -> FakePush:
    return FakePush()


@pytest.fixture
async def front(tmp_path: Path, sent: FakePush) -> AsyncIterator[Front]:
    async with serving(tmp_path, push=sent) as front:
        await front.ready()
        yield front


async def push(front: Front, version: int, *targets: str) -> trainer.PushWeightsResponse:
    """PushWeights."""
    request = trainer.PushWeightsRequest(session_id=ID, version=version, targets=targets)
    return await front.stub.PushWeights(request)


def exported(front: Front) -> list[str]:
    """Versions that the worker wrote images of."""
    return (front.output / "exported").read_text().split()


async def test_the_weights_after_a_step_go_to_all_replicas(front: Front, sent: FakePush) -> None:
    await front.train(1)
    response = await push(front, 1, "a:1", "b:1")
    assert sent.calls == [(1, ["a:1", "b:1"], b"weights of step 1")]
    assert (response.version, response.kind, response.num_bytes) == (1, weights.WEIGHT_KIND_LORA, 17)
    assert (response.seconds, response.pause_seconds) == (0.5, 0.01)
    assert [(replica.target, replica.HasField("error")) for replica in response.replicas] == [
        ("a:1", False),
        ("b:1", False),
    ]
    assert (await front.get()).policy_version == 1


async def test_a_replica_that_comes_late_gets_the_same_image(front: Front, sent: FakePush) -> None:
    await front.train(1)
    await push(front, 1, "a:1")
    await front.train(2)
    await push(front, 1, "new:1")
    assert sent.calls[1] == (1, ["new:1"], b"weights of step 1")
    assert exported(front) == ["1"]


async def test_only_the_newest_image_is_kept(front: Front) -> None:
    for step in (1, 2, 3):
        await front.train(step)
        await push(front, step, "a:1")
    assert exported(front) == ["1", "2", "3"]
    assert [folder.name for folder in front.scratch.path.iterdir() if folder.is_dir()] == ["v3"]


async def test_a_replica_that_fails_its_commit_is_named_and_the_others_serve(front: Front, sent: FakePush) -> None:
    sent.fails_commit = {"b:1"}
    await front.train(1)
    response = await push(front, 1, "a:1", "b:1")
    assert not response.replicas[0].HasField("error")
    assert isinstance(from_status(response.replicas[1].error), InternalError)
    assert (await front.get()).policy_version == 1


async def test_a_replica_that_cannot_be_reached_keeps_all_from_committing(front: Front, sent: FakePush) -> None:
    sent.staging_error = UnavailableError("nobody there", metadata={"b:1": "nobody there"})
    await front.train(1)
    response = await push(front, 1, "a:1", "b:1")
    errors = [from_status(replica.error) for replica in response.replicas]
    assert [error.reason for error in errors] == ["PUSH_ABORTED", "UNAVAILABLE"]
    assert (await front.get()).policy_version == 0


async def test_a_push_that_failed_can_be_made_again_with_the_same_bytes(front: Front, sent: FakePush) -> None:
    await front.train(1)
    sent.staging_error = UnavailableError("nobody there")
    await push(front, 1, "a:1")
    sent.staging_error = None
    response = await push(front, 1, "a:1")
    assert not response.replicas[0].HasField("error")
    assert exported(front) == ["1"]
    assert sent.ids[0] == sent.ids[1]


async def test_a_version_that_the_trainer_is_not_at_is_refused(front: Front) -> None:
    await front.train(1)
    with pytest.raises(FailedPreconditionError, match="1 steps are done"):
        await push(front, 2, "a:1")


@pytest.mark.parametrize(
    ("version", "targets", "what"),
    [(0, ["a:1"], "as loaded"), (1, [], "no replica"), (1, ["a:1", ""], "empty"), (1, ["a:1", "a:1"], "twice")],
)
async def test_pushes_that_cannot_be_meant(front: Front, version: int, targets: list[str], what: str) -> None:
    await front.train(1)
    with pytest.raises(InvalidInputError, match=what):
        await push(front, version, *targets)


async def test_the_base_of_quantised_weights_is_pushed_as_version_0_and_named_by_adapters(
    tmp_path: Path, sent: FakePush
) -> None:
    async with serving(tmp_path, push=sent) as front:
        await front.ready(train={"qlora_bnb": True})
        session = await front.get()
        assert session.base_id.startswith(f"{ID}-")
        await push(front, 0, "a:1")
        await front.train(1)
        await push(front, 1, "a:1")
        await push(front, 0, "late:1")
        await push(front, 1, "late:1")
        assert [version for version, *_ in sent.calls] == [0, 1, 0, 1]
        assert exported(front) == ["0", "1"], "the base is kept for replicas that come late"
        assert {manifest.base_id for manifest in sent.manifests} == {session.base_id}
        assert not [*front.scratch.path.rglob("*base*")], "it has the size of the model: it is on disk, not in memory"
        await front.stub.DeleteSession(trainer.DeleteSessionRequest(session_id=ID))
        assert not [*front.output.rglob("*base*")]


async def test_there_is_no_base_to_push_where_it_is_the_model_as_loaded(front: Front) -> None:
    assert not (await front.get()).base_id
    with pytest.raises(InvalidInputError, match="version is 0"):
        await push(front, 0, "a:1")
