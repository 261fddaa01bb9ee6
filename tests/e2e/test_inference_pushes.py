"""Logprobs agree with transformers and PEFT in float32 before, during and after pushes of adapters and full weights."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from safetensors.numpy import load_file, save_file

from surogate.errors import FailedPreconditionError, InvalidInputError
from surogate.v1 import common_pb2, inference_pb2, weights_pb2
from surogate.weights.manifest import build_manifest
from tests.helpers.inference import (
    Reference,
    Replica,
    adapter_manifest,
    chunks,
    full_manifest,
    largest_error,
    replica,
)
from tests.helpers.models.tiny import make_tiny_adapter, make_tiny_model

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1200)]

TOLERANCE = 1e-5
TEMPERATURE = 0.7
EOS = 1
PROMPT = [2, *range(10, 90)]
WEIGHTS = "model.safetensors"
OTHER = 9
"""What is of the same kind, but of a model of another size."""
LONG = {"max_tokens": 300, "min_tokens": 300, "temperature": TEMPERATURE}


@dataclass
class Served:
    """A replica, and the directories and references of the versions that are pushed to it: 0, 1, 2."""

    replica: Replica
    directories: dict[int, Path]
    references: dict[int, Reference]
    full: bool

    def manifest(self, version_of: int, version: int) -> tuple[weights_pb2.WeightManifest, Path]:
        """Manifest and image of what is in directory `version_of`, as `version`."""
        return (full_manifest if self.full else adapter_manifest)(self.directories[version_of], version)

    def error(self, completion: inference_pb2.Completion, banned: tuple[int, ...] = ()) -> float:
        return largest_error(self.references, PROMPT, completion, TEMPERATURE, banned=banned)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["adapters", "full"])
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    paths = {version: folder / str(version) for version in range(3)}
    make_tiny_model(paths[0], std=0.1)
    paths[OTHER] = folder / "other"
    if request.param == "adapters":
        make_tiny_model(folder / "wider", hidden=96)
        make_tiny_adapter(paths[OTHER], folder / "wider")
        for version in (1, 2):
            make_tiny_adapter(paths[version], paths[0], seed=version)
        references = {0: Reference(paths[0]), **{v: Reference(paths[0], paths[v]) for v in (1, 2)}}
    else:
        make_tiny_model(paths[OTHER], hidden=96)
        for version in (1, 2):
            make_tiny_model(paths[version], std=0.1, seed=version)
        references = {version: Reference(paths[version]) for version in range(3)}
    full = request.param == "full"
    async with replica(folder, paths[0], *(["--no-enable-lora", "--delta-updates"] if full else [])) as started:
        yield Served(started, paths, references, full)


async def test_a_model_as_loaded_has_version_0_and_shares_prompts_that_it_has_seen(served: Served) -> None:
    first = await served.replica.generate(PROMPT, 4, max_tokens=30, temperature=TEMPERATURE, seed=7)
    again = await served.replica.generate(PROMPT, 1, max_tokens=30, temperature=TEMPERATURE, seed=7)

    assert again.cached_prompt_tokens > 0
    assert again.completions[0].token_ids == first.completions[0].token_ids, "a seed draws the same tokens"
    assert first.completions[1].token_ids != first.completions[0].token_ids, "completion i has seed + i"
    for completion in [*first.completions, *again.completions]:
        assert [span.policy_version for span in completion.policy_spans] == [0]
        assert served.error(completion) <= TOLERANCE


async def test_requests_in_flight_go_on_under_the_pushed_version(served: Served) -> None:
    manifest, image = served.manifest(1, 1)
    await served.replica.stage("in-flight", manifest, image)
    groups = [asyncio.ensure_future(served.replica.generate(PROMPT, 4, **LONG)) for _ in range(3)]
    await asyncio.sleep(0)  # sends them
    await served.replica.until_tokens_flow(PROMPT)

    committed = await served.replica.commit("in-flight")

    assert committed.state == weights_pb2.WeightUpdate.STATE_COMMITTED
    assert committed.pause.ToTimedelta().total_seconds() > 0
    completions = [completion for group in groups for completion in (await group).completions]
    spans = {tuple(span.policy_version for span in completion.policy_spans) for completion in completions}
    assert (0, 1) in spans
    assert spans <= {(0, 1), (1,)}, "a request that the commit overtook begins under the new version"
    assert max(served.error(completion, (EOS,)) for completion in completions) <= TOLERANCE
    assert (await served.replica.served()).policy_version == 1


async def test_a_prefix_cached_before_a_push_is_not_used_after_it(served: Served) -> None:
    assert (await served.replica.generate(PROMPT, 1, max_tokens=1)).cached_prompt_tokens > 0

    await served.replica.push(*served.manifest(2, 2))
    after = await served.replica.generate(PROMPT, 1, max_tokens=30, temperature=TEMPERATURE, min_policy_version=2)

    assert after.cached_prompt_tokens == 0
    assert [span.policy_version for span in after.completions[0].policy_spans] == [2]
    assert served.error(after.completions[0]) <= TOLERANCE
    assert (await served.replica.generate(PROMPT, 1, max_tokens=1)).cached_prompt_tokens > 0


async def test_given_tokens_are_scored_at_the_temperature(served: Served) -> None:
    sequences = [PROMPT, [5, 6], [*PROMPT, *range(10, 200)]]
    response = await served.replica.inference.ScoreTokens(
        inference_pb2.ScoreTokensRequest(
            sequences=[common_pb2.TokenSequence(ids=ids) for ids in sequences], temperature=TEMPERATURE
        )
    )

    assert response.policy_version == 2
    for ids, scored in zip(sequences, response.sequences, strict=True):
        expected = served.references[2].logprobs(ids[:1], ids[1:], TEMPERATURE)
        assert scored.logprobs == pytest.approx(expected, abs=TOLERANCE)


async def test_a_push_that_fails_before_its_commit_changes_nothing(served: Served) -> None:
    served_before = (await served.replica.served()).policy_version
    manifest, image = served.manifest(1, 3)
    data = bytearray(image.read_bytes())
    data[-1] ^= 0xFF

    await served.replica.weights.CreateWeightUpdate(
        weights_pb2.CreateWeightUpdateRequest(update_id="broken", manifest=manifest)
    )
    with pytest.raises(Exception, match="checksum"):
        await served.replica.weights.UploadWeights(chunks("broken", bytes(data)))
    with pytest.raises(FailedPreconditionError):
        await served.replica.commit("broken")
    await served.replica.weights.AbortWeightUpdate(weights_pb2.AbortWeightUpdateRequest(update_id="broken"))

    after = await served.replica.generate(PROMPT, 2, max_tokens=20, temperature=TEMPERATURE)
    assert (await served.replica.served()).policy_version == served_before
    assert max(served.error(completion) for completion in after.completions) <= TOLERANCE


async def test_an_update_that_does_not_fit_the_model_is_refused_when_it_is_announced(served: Served) -> None:
    manifest, _ = served.manifest(OTHER, 3)
    with pytest.raises(InvalidInputError, match="shape"):
        await served.replica.weights.CreateWeightUpdate(
            weights_pb2.CreateWeightUpdateRequest(update_id="wrong", manifest=manifest)
        )


async def test_text_streams_piece_by_piece(served: Served) -> None:
    conversation = inference_pb2.StreamGenerateRequest.Conversation(
        messages=[common_pb2.ChatMessage(role="user", content="hello")]
    )
    request = inference_pb2.StreamGenerateRequest(
        conversation=conversation, sampling=common_pb2.SamplingParams(max_tokens=20, min_tokens=20, seed=1)
    )
    pieces = [piece async for piece in served.replica.inference.StreamGenerate(request)]

    assert sum(len(piece.token_ids) for piece in pieces) == 20
    assert "".join(piece.text for piece in pieces)
    assert [piece.finish_reason for piece in pieces[:-1]] == [common_pb2.FINISH_REASON_UNSPECIFIED] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert {piece.policy_version for piece in pieces} == {2}


async def test_a_delta_replaces_tensors_of_full_weights_but_not_beneath_an_adapter(
    served: Served, tmp_path: Path
) -> None:
    key = "model.layers.1.self_attn.k_proj.weight"  # vLLM keeps it in one tensor with those of q_proj and v_proj
    checkpoints = [load_file(served.directories[version if served.full else 0] / WEIGHTS) for version in (1, 2)]
    delta = tmp_path / "delta.safetensors"
    save_file({key: checkpoints[0][key]}, delta)
    manifest = build_manifest(delta, version=3, kind=weights_pb2.WEIGHT_KIND_DELTA, base_version=2)

    if not served.full:
        with pytest.raises(FailedPreconditionError, match="an adapter is served"):
            await served.replica.push(manifest, delta)
        return
    await served.replica.push(manifest, delta)
    shutil.copytree(served.directories[2], tmp_path / "expected")
    save_file({**checkpoints[1], key: checkpoints[0][key]}, tmp_path / "expected" / WEIGHTS, {"format": "pt"})
    after = await served.replica.generate(PROMPT, 2, max_tokens=20, temperature=TEMPERATURE)
    references = {3: Reference(tmp_path / "expected")}
    assert max(largest_error(references, PROMPT, item, TEMPERATURE) for item in after.completions) <= TOLERANCE
