"""The trainer and the sampler are one policy: after every push, in flight, over caches, and whatever becomes of a push.

A real trainer pushes to real replicas. Logprobs are compared at a temperature other than 1, in float32.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from surogate.v1 import inference_pb2, trainer_pb2
from tests.helpers.inference import Replica, replica
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.trainer.trainer_process import TrainerProcess, trainer_process

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1200)]

TOLERANCE = 1e-5
TEMPERATURE = 0.7
PROMPT = [2, *range(10, 90)]
"""Longer than a block of the cache, so that it is kept."""


@dataclass
class Setup:
    """A trainer, the replicas that it pushes to, and what its session is made of."""

    trainer: TrainerProcess
    replicas: list[Replica]
    train: dict[str, Any]

    @property
    def targets(self) -> list[str]:
        return [each.process.address for each in self.replicas]

    async def generate(self, n: int = 4, max_tokens: int = 24, **more: Any) -> inference_pb2.GenerateRolloutsResponse:
        return await self.replicas[0].generate(PROMPT, n, temperature=TEMPERATURE, max_tokens=max_tokens, **more)

    async def step(self, number: int) -> None:
        """Generates and trains one step."""
        completions = (await self.generate()).completions
        await self.trainer.train(number, samples(completions))

    async def push(self, version: int) -> None:
        """Pushes to all replicas."""
        response = await self.trainer.push(version, *self.targets)
        assert not any(outcome.HasField("error") for outcome in response.replicas), response

    async def errors(self, completions: Iterable[inference_pb2.Completion], version: int) -> list[float]:
        """Distances, for tokens stamped with the version, of the sampler's logprobs from the trainer's of now."""
        completions = list(completions)
        scored = await self.trainer.logprobs([[*PROMPT, *item.token_ids] for item in completions], TEMPERATURE)
        found = []
        for completion, logprobs in zip(completions, scored, strict=True):
            expected = logprobs[len(PROMPT) - 1 :]
            versions = [span.policy_version for span in completion.policy_spans for _ in range(span.num_tokens)]
            assert len(versions) == len(completion.logprobs) == len(expected)
            rows = zip(versions, completion.logprobs, expected, strict=True)
            found += [abs(ours - theirs) for stamped, ours, theirs in rows if stamped == version]
        return found

    async def versions(self) -> list[int]:
        return [(await each.served()).policy_version for each in self.replicas]

    async def same(self) -> bool:
        """Whether all replicas complete the prompt alike."""
        answers = [await each.generate(PROMPT, 2, max_tokens=16, seed=5, temperature=1.0) for each in self.replicas]
        ids = [[list(item.token_ids) for item in answer.completions] for answer in answers]
        return all(one == ids[0] for one in ids)


def samples(completions: Sequence[inference_pb2.Completion]) -> list[trainer_pb2.TrainingSample]:
    """Rollouts to train on, every second one good and the others bad."""
    return [
        trainer_pb2.TrainingSample(
            sample_id=f"{index}",
            token_ids=[*PROMPT, *item.token_ids],
            loss_mask=[False] * len(PROMPT) + [True] * len(item.token_ids),
            sampler_logprobs=[0.0] * len(PROMPT) + list(item.logprobs),
            advantage=(-1.0) ** index,
            temperature=TEMPERATURE,
        )
        for index, item in enumerate(completions)
    ]


QLORA = pytest.param("qlora", marks=pytest.mark.slow)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["lora", "full", QLORA])
async def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny_model(folder / "model", std=0.1)
    lora = request.param != "full"
    train = {
        "model": str(folder / "model"),
        "output_dir": str(folder / "out"),
        "torch_dtype": "float32",
        "sequence_len": 512,
        "max_steps": 10,
        "optimizer": "adamw",
        "learning_rate": 1e-2 if lora else 1e-3,
        "lora": lora,
        **({"lora_rank": 8, "lora_alpha": 16} if lora else {}),
        **({"qlora_bnb": True} if request.param == "qlora" else {}),
    }
    flags = [] if lora else ["--no-enable-lora"]
    async with AsyncExitStack() as stack:
        trainer = await stack.enter_async_context(trainer_process(folder / "out"))
        starting = [replica(folder / f"{i}", folder / "model", *flags) for i in range(2 if lora else 1)]
        replicas = await asyncio.gather(*(stack.enter_async_context(each) for each in starting))
        await trainer.ready(train)
        made = Setup(trainer, list(replicas), train)
        if request.param == "qlora":  # the replicas have loaded the model as it is, and never see the trainer's disk
            assert max(await made.errors((await made.generate()).completions, version=0)) > 100 * TOLERANCE
            await made.push(0)
        yield made


async def test_the_model_as_loaded_is_the_same_on_both_sides(setup: Setup) -> None:
    found = await setup.errors((await setup.generate()).completions, version=0)
    assert found and max(found) <= TOLERANCE


async def test_after_every_push_logprobs_agree_and_a_cached_prefix_is_not_used_across_it(setup: Setup) -> None:
    for version in (1, 2):
        await setup.step(version)
        assert (await setup.generate()).cached_prompt_tokens > 0, "the prompt is in the cache before the push"
        await setup.push(version)
        first = await setup.generate(n=1, min_policy_version=version)
        assert first.cached_prompt_tokens == 0
        more = await setup.generate(min_policy_version=version)
        assert more.cached_prompt_tokens > 0, "the same version shares it again"
        completions = [*first.completions, *more.completions]
        found = await setup.errors(completions, version)
        assert len(found) == sum(len(item.token_ids) for item in completions), "all are stamped with the version"
        assert max(found) <= TOLERANCE


async def test_tokens_in_flight_over_a_push_agree_each_with_the_version_that_they_are_stamped_with(
    setup: Setup,
) -> None:
    before = await setup.trainer.checkpoint(2)
    await setup.step(3)
    pushed, completions = asyncio.Event(), list[inference_pb2.Completion]()

    async def generate(max_tokens: int) -> None:
        while not pushed.is_set():  # however long the push takes, it meets tokens in flight
            completions.extend((await setup.generate(8, max_tokens)).completions)

    generating = [asyncio.ensure_future(generate(max_tokens)) for max_tokens in (400, 270)]
    await asyncio.sleep(0)  # sends them
    await setup.replicas[0].until_tokens_flow(PROMPT)
    await setup.push(3)
    pushed.set()
    await asyncio.gather(*generating)

    spans = {tuple(span.policy_version for span in item.policy_spans) for item in completions}
    assert (2, 3) in spans, spans
    new = await setup.errors(completions, 3)
    assert max(new) <= TOLERANCE
    assert max(await setup.errors(completions, 2)) > 100 * TOLERANCE, "a wrong stamp would show: the policy has moved"
    after = await setup.trainer.checkpoint(3)
    await setup.trainer.close()
    await setup.trainer.ready(setup.train, resume_from=before)
    old = await setup.errors(completions, 2)
    assert old and max(old) <= TOLERANCE
    await setup.trainer.close()
    await setup.trainer.ready(setup.train, resume_from=after)


async def test_a_push_that_does_not_reach_all_replicas_changes_none(setup: Setup) -> None:
    await setup.step(4)
    response = await setup.trainer.push(4, *setup.targets, "127.0.0.1:9")
    assert all(outcome.HasField("error") for outcome in response.replicas)
    assert set(await setup.versions()) == {3}
    assert await setup.same()
    await setup.push(4)
    assert set(await setup.versions()) == {4}
    assert await setup.same()
    assert max(await setup.errors((await setup.generate(min_policy_version=4)).completions, 4)) <= TOLERANCE


async def test_a_trainer_that_is_killed_in_a_push_leaves_replicas_that_the_next_one_brings_together(
    setup: Setup, tmp_path: Path
) -> None:
    if len(setup.replicas) == 1:
        pytest.skip("about two replicas")
    served = max(await setup.versions())
    async with trainer_process(tmp_path / "first") as killed:
        await killed.ready(setup.train)
        for step in range(1, served + 2):
            await killed.train(step, one_step(step))
        pushing = asyncio.ensure_future(killed.push(served + 1, *setup.targets))
        await asyncio.sleep(0.01)
        os.kill(killed.process.process.pid, signal.SIGKILL)
        await asyncio.gather(pushing, return_exceptions=True)
    assert set(await setup.versions()) <= {served, served + 1}, "each serves a whole version"

    async with trainer_process(tmp_path / "second") as other:
        await other.ready(setup.train)
        for step in range(1, served + 3):
            await other.train(step, one_step(step))
        response = await other.push(served + 2, *setup.targets)
        assert not any(outcome.HasField("error") for outcome in response.replicas), response
    assert set(await setup.versions()) == {served + 2}
    assert await setup.same()


def one_step(step: int) -> list[trainer_pb2.TrainingSample]:
    """Samples that need no sampler."""
    ids = [5, 6, 7, 8 + step]
    sample = trainer_pb2.TrainingSample(sample_id="a", token_ids=ids, loss_mask=[False, False, True, True])
    sample.sampler_logprobs.extend([0.0, 0.0, -5.0, -5.0])
    sample.advantage, sample.temperature = 1.0, 1.0
    return [sample]
