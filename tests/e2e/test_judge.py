"""`judge` over an inference service of ours, with vLLM in it: answers read and unread, requests at once, cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reward_svc.environments.judge import Judge
from reward_svc.judges.endpoint import Endpoint, Reply
from surogate.v1 import reward_pb2
from tests.helpers.inference import TOKEN, replica
from tests.helpers.models.tiny import EOS, SPECIAL_TOKENS, VOCAB_SIZE, make_tiny_model, make_tiny_tokenizer
from tests.helpers.reward.rewards import group, outcomes, reward_stub

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

GOOD, BETTER, UNREADABLE = (
    '{"scores": [{"id": 1, "score": 0.25, "reason": "short"}]}',
    'A thought. {"scores": [{"id": 1, "score": 0.75}]}',
    "I would rather not say.",
)
COUNT = 24


def make_judging_model(directory: Path) -> None:
    """A model that answers with one of the three texts, each a token of its own, a third of the time each."""
    import torch

    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens([GOOD, BETTER, UNREADABLE])
    answers = tokenizer.convert_tokens_to_ids([GOOD, BETTER, UNREADABLE])
    model = make_tiny_model(vocab_size=VOCAB_SIZE + 4, max_position_embeddings=8192, tie_word_embeddings=False)
    with torch.no_grad():
        for layer in model.model.layers:  # what comes next depends on the last token alone
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[answers] = torch.eye(model.config.hidden_size)[1]
        model.lm_head.weight[answers, 0] = 4
        model.lm_head.weight[SPECIAL_TOKENS.index(EOS), 1] = 4
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


class Counted:
    """How many requests an endpoint has at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        ask = Endpoint._inference

        async def counted(endpoint: Endpoint, *args: Any, **kwargs: Any) -> Reply:
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                return await ask(endpoint, *args, **kwargs)
            finally:
                self.now -= 1

        monkeypatch.setattr(Endpoint, "_inference", counted)


async def test_our_own_inference_service_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_judging_model(tmp_path / "model")
    counted = Counted(monkeypatch)
    monkeypatch.setenv("TINY_API_KEY", TOKEN)
    async with replica(tmp_path, tmp_path / "model") as served, reward_stub(Judge()) as stub:
        args = {
            "base_url": f"grpc://{served.process.address}",
            "api_key_var": "TINY_API_KEY",
            "max_concurrent": 2,
            "max_retries_on_parse_error": 8,
            "sampling": {"max_tokens": 4, "temperature": 1.0},
            "cost": {"input_per_million": 1.0, "output_per_million": 1000.0},
        }
        completions = [f"answer {n}" for n in range(COUNT)]
        response = await stub.ScoreRollouts(group("judge", *completions, args=args), timeout=200)
        assert set(outcomes(response)) == {0.25, 0.75}
        assert counted.most == 2
        tries = [_tries(result.score, len(completions[0])) for result in response.results]
        assert min(tries) == 1
        assert max(tries) > 1, "some answers could not be read at first"

        args["max_retries_on_parse_error"] = 0
        once = outcomes(await stub.ScoreRollouts(group("judge", *completions, args=args), timeout=200))
        assert set(once) == {0.25, 0.75, "JUDGE_FAILED"}, "what cannot be read is an error, and no reward of 0"

        relative = {**args, "relative": True, "max_retries_on_parse_error": 8}
        response = await stub.ScoreRollouts(group("judge", "same", "same", args=relative), timeout=200)
        assert len(set(outcomes(response))) == 1


def _tries(score: reward_pb2.Score, length: int) -> int:
    """How often the judge was asked: each time it makes two tokens, and is given no fewer than the completion has."""
    parts = score.components
    tries = round(parts["output_tokens"] / 2)
    assert parts["output_tokens"] == 2 * tries
    assert parts["input_tokens"] > tries * length
    assert parts["cost"] == pytest.approx((parts["input_tokens"] + 1000 * parts["output_tokens"]) / 1e6)
    return tries
