"""Episodes of several turns in the loop: token by token what was sampled, masked where the environment spoke."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator_svc.grpo.rewards.scoring import Environment, Scorer
from orchestrator_svc.grpo.rewards.services import Custom
from orchestrator_svc.grpo.rollouts.template import as_messages
from orchestrator_svc.grpo.rollouts.tokenizer import ChatTokenizer
from surogate.errors import ConfigError, InternalError, UnavailableError
from surogate.process import start_service
from surogate.rollouts import read_steps
from surogate.rpc.channel import ClientSecurity
from surogate.structs import to_struct
from surogate.v1 import common_pb2, inference_pb2, reward_pb2
from tests.helpers.grpo.grpo_fakes import Fakes, completions
from tests.helpers.grpo.grpo_job import GrpoJob, grpo_job
from tests.helpers.models.tiny import PLAIN_CHAT_TEMPLATE

EOS = 1
PRINTABLE = 90  # ids from 4 on that are printable ASCII


class Sampler:
    """Completions of printable characters and an end-of-turn token; turn k is version k's. Remembers the requests."""

    def __init__(self, fakes: Fakes) -> None:
        self.requests: dict[str, inference_pb2.GenerateRolloutsRequest] = {}
        self.turns: dict[str, inference_pb2.Completion] = {}
        fakes.hooks.on["GenerateRollouts"] = self.generate

    async def generate(self, request: inference_pb2.GenerateRolloutsRequest) -> inference_pb2.GenerateRolloutsResponse:
        response = completions(request, version=int(request.request_id.rpartition("-turn-")[2]))
        for completion in response.completions:
            completion.token_ids[:] = [4 + token % PRINTABLE for token in completion.token_ids[:-1]] + [EOS]
        self.requests[request.request_id] = request
        self.turns[request.request_id] = response.completions[0]
        return response

    def episode(self, rollout_id: str) -> list[tuple[list[int], inference_pb2.Completion]]:
        """(prompt, what was sampled) of each turn."""
        found, turn = [], 1
        while (key := f"{rollout_id}-turn-{turn}") in self.requests:
            found.append((list(self.requests[key].prompt_token_ids), self.turns[key]))
            turn += 1
        return found


def multi_turn(job: GrpoJob, fakes: Fakes, max_turns: int | None = 4) -> Sampler:
    """Has the fake environment answer turns, of a model with an ordinary chat template."""
    (Path(job.settings.model) / "chat_template.jinja").write_text(PLAIN_CHAT_TEMPLATE)
    fakes.reward.multi_turn = True
    spec = replace(job.settings.environments[0], max_turns=max_turns)
    job.settings = replace(job.settings, environments=[spec])
    return Sampler(fakes)


def stored(job: GrpoJob) -> list[dict[str, Any]]:
    """All rollouts of the job's store."""
    return [row for _, rows in read_steps(job.folder) for row in rows]


def metrics(job: GrpoJob) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]


async def test_an_episode_is_one_sequence_of_the_very_tokens(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=2, evaluate=2) as (job, fakes):
        sampler = multi_turn(job, fakes)
        await job.run()
        tokenizer = ChatTokenizer.load(job.settings.model)
        rows = {row["rollout_id"]: row for row in stored(job)}
        samples = fakes.trainer.samples
        assert {sample.sample_id for sample in samples} == set(rows)
        assert {row["turns"] for row in rows.values()} > {1, 2}
        for sample in samples:
            turns = sampler.episode(sample.sample_id)
            for (before, spoken), (after, _) in pairwise(turns):
                assert after[: len(before) + len(spoken.token_ids)] == before + list(spoken.token_ids)
            last_prompt, last = turns[-1]
            assert list(sample.token_ids) == last_prompt + list(last.token_ids)

            mask, logprobs = np.array(sample.loss_mask), np.array(sample.sampler_logprobs)
            said = [token for _, turn in turns for token in turn.token_ids]
            assert np.array(sample.token_ids)[mask].tolist() == said
            assert logprobs[mask].tolist() == [value for _, turn in turns for value in turn.logprobs]
            assert not logprobs[~mask].any()
            assert [(s.policy_version, s.num_tokens) for s in sample.policy_spans] == [
                (turn, len(completion.token_ids)) for turn, (_, completion) in enumerate(turns, start=1)
            ]

            row = rows[sample.sample_id]
            conversation = json.loads(row["prompt"]) + json.loads(row["messages"])
            assert len(json.loads(row["state"])["heard"]) == row["turns"] == len(turns)
            assert (row["oldest_version"], row["newest_version"]) == (1, len(turns))
            assert sum(row["sampled"]) == len(said)
            # Sampled text is plain here, so that rendering all of it anew must give the same text.
            text = tokenizer._template.render(conversation)
            ids = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
            assert ids[: len(sample.token_ids)] == list(sample.token_ids)
        line = metrics(job)[0]
        of_first = [row for row in rows.values() if row["step"] == 1]
        assert line["episode/turns"] == pytest.approx(np.mean([row["turns"] for row in of_first]))
        assert line["completion/length"] == pytest.approx(np.mean([sum(row["sampled"]) for row in of_first]))
        evaluated = [e.evaluation_completed for e in await job.events() if e.HasField("evaluation_completed")]
        assert evaluated[-1].metrics["episode/turns"] > 1


async def test_what_scores_sees_the_whole_episode(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=1) as (job, fakes):
        multi_turn(job, fakes)
        await job.run()
        for rollout in fakes.reward.scored:
            said = [message["content"] for message in as_messages(rollout.messages) if message["role"] == "assistant"]
            assert list(rollout.state["heard"]) == said
            assert rollout.completion == said[-1]
            assert rollout.num_tokens == sum(len(text) + 1 for text in said)


@pytest.mark.parametrize("max_turns", [1, 3])
async def test_episodes_end_after_so_many_turns_at_the_latest(tmp_path: Path, max_turns: int) -> None:
    async with grpo_job(tmp_path, max_steps=1) as (job, fakes):
        multi_turn(job, fakes, max_turns)
        await job.run()
        assert max(row["turns"] for row in stored(job)) == max_turns
        assert metrics(job)[0]["episode/turns_max"] == max_turns
        assert all(json.loads(row["messages"])[-1]["role"] == "assistant" for row in stored(job))
        assert fakes.hooks.calls["TakeTurn"] == sum(row["turns"] for row in stored(job)), "each turn was shown"


async def test_an_answer_for_which_there_is_no_room_ends_the_episode(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=1, context=100) as (job, fakes):
        multi_turn(job, fakes)
        await job.run()
        cut = [row for row in stored(job) if row["finish_reason"] == "length"]
        assert cut
        assert all(len(row["prompt_ids"]) + len(row["token_ids"]) <= 100 for row in stored(job))
        assert metrics(job)[0]["completion/truncated_fraction"] == len(cut) / 8


@pytest.mark.parametrize("answer", [["x" * 100_000], ["x"] * 1000])
async def test_an_answer_that_is_far_too_long_ends_the_episode_before_it_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: list[str]
) -> None:
    encode = ChatTokenizer.encode_answer
    encoded: list[int] = []

    def counted(self: ChatTokenizer, prompt: Any, said: Any, given: Any, last_id: int) -> list[int]:
        encoded.append(sum(len(message.content) for message in given))
        return encode(self, prompt, said, given, last_id)

    async def flood(request: reward_pb2.TakeTurnRequest) -> reward_pb2.TakeTurnResponse:
        messages = [common_pb2.ChatMessage(role="user", content=text) for text in answer]
        return reward_pb2.TakeTurnResponse(messages=messages)

    async with grpo_job(tmp_path, max_steps=1, context=100) as (job, fakes):
        multi_turn(job, fakes)
        fakes.hooks.on["TakeTurn"] = flood
        monkeypatch.setattr(ChatTokenizer, "encode_answer", counted)
        await job.run()
        assert {(row["turns"], row["finish_reason"]) for row in stored(job)} == {(1, "length")}
    assert max(encoded, default=0) < 1000  # of the template's own trial


async def test_an_episode_whose_turn_is_not_answered_is_left_out(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=2, refill_rounds=1) as (job, fakes):
        multi_turn(job, fakes)

        async def break_one(request: reward_pb2.TakeTurnRequest) -> None:
            if request.rollout_id.endswith("0002") or request.group_id == f"{1:09d}":
                raise InternalError("the game crashed")

        fakes.hooks.on["TakeTurn"] = break_one
        await job.run()
        assert Counter(row.cause or row.state for row in await job.draws()) == {"trained": 4, "environment": 1}
        assert not any(row["rollout_id"].endswith("0002") for row in stored(job))
        assert len(fakes.trainer.samples) == 4 * 3
        assert metrics(job)[0]["groups/environment"] == 1
        notices = [event.notice.text for event in await job.events() if event.HasField("notice")]
        assert any("the first failure: turn 1 of rollout" in text and "the game crashed" in text for text in notices)


async def test_an_episode_goes_on_when_its_service_comes_back(tmp_path: Path) -> None:
    async with grpo_job(tmp_path, max_steps=1) as (job, fakes):
        multi_turn(job, fakes)
        failed: set[tuple[str, int]] = set()

        async def away_for_a_moment(request: reward_pb2.TakeTurnRequest) -> None:
            if request.turn == 2 and (request.rollout_id, 2) not in failed:
                failed.add((request.rollout_id, 2))
                raise UnavailableError("restarting")

        fakes.hooks.on["TakeTurn"] = away_for_a_moment
        await job.run()
        assert failed
        assert len(stored(job)) == 8, "the state was with the caller"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}[{{ m.role }}]{% endfor %}", "does not render the assistant's turn"),
        (
            "{% for m in messages %}{{ m.content if m.role == 'assistant' or loop.last else '-' }};{% endfor %}",
            "renders the prompt differently",
        ),
        (
            "{% for m in messages %}{{ m.content if loop.first or m.role == 'assistant' }};{% endfor %}",
            "does not show what messages of role user say",
        ),
    ],
)
async def test_a_template_that_cannot_go_on_is_refused_at_the_start(tmp_path: Path, template: str, why: str) -> None:
    async with grpo_job(tmp_path) as (job, fakes):
        multi_turn(job, fakes)
        (Path(job.settings.model) / "chat_template.jinja").write_text(template)
        with pytest.raises(ConfigError, match=why) as caught:
            await job.run()
        assert [item.field for item in caught.value.violations] == ["model"]
        assert fakes.hooks.calls["GenerateRollouts"] == 0


async def test_turns_are_refused_where_nobody_answers_them(tmp_path: Path) -> None:
    async with grpo_job(tmp_path) as (job, fakes):
        multi_turn(job, fakes)
        fakes.reward.multi_turn = False
        with pytest.raises(ConfigError, match="does not answer turns") as caught:
            await job.run()
        assert [item.field for item in caught.value.violations] == ["orch.env.0.max_turns"]


async def test_seeds_of_turns_differ_and_are_the_same_in_every_run(tmp_path: Path) -> None:
    seeds = []
    for name in ("a", "b"):
        async with grpo_job(tmp_path / name, max_steps=1) as (job, fakes):
            sampler = multi_turn(job, fakes)
            await job.run()
            seeds.append({key: request.sampling.seed for key, request in sampler.requests.items()})
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0].values())) == len(seeds[0])
    assert common_pb2.SamplingParams(seed=max(seeds[0].values())).seed < 2**49


async def test_a_kill_of_the_service_in_the_middle_of_an_episode_loses_nothing(tmp_path: Path) -> None:
    """With the real service: what it answers after the kill is what it would have answered before."""
    service = await start_service("reward_svc", log_file=tmp_path / "log")
    endpoint = Custom(service.address, ClientSecurity())
    game = Environment("game", "guess-number", to_struct({"span": 50}), endpoint, timeout=60.0, max_turns=8)
    scorer = Scorer({"game": game}, job="job", patience=60.0)
    try:
        first = await scorer.take_turn(game, _turn(reward_pb2.TakeTurnResponse(), "10"))
        unharmed = await scorer.take_turn(game, _turn(first, "10", "20"))
        service.process.kill()
        await service.process.wait()
        asked = asyncio.create_task(scorer.take_turn(game, _turn(first, "10", "20")))
        service = await start_service("reward_svc", log_file=tmp_path / "log", listen=service.address)
        assert await asked == unharmed
        assert unharmed.state["closest"] == 22
        last = await scorer.take_turn(game, _turn(unharmed, "10", "20", "42"))
        assert not last.messages
    finally:
        await endpoint.close()
        await service.stop()


def _turn(before: reward_pb2.TakeTurnResponse, *guesses: str) -> reward_pb2.TakeTurnRequest:
    request = reward_pb2.TakeTurnRequest(turn=len(guesses), state=before.state, rollout_id="r")
    request.example.answer = "42"
    for guess in guesses:
        request.messages.add(role="assistant", content=guess)
    return request
