"""`judge`: what it asks, how it reads the answer, what it does when the endpoint fails, and what it costs."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from orchestrator_svc.grpo.configured.setup import read_settings
from reward_svc.environments.judge import TOKENS, Judge
from reward_svc.judges.endpoint import Reply
from reward_svc.judges.verdict import UnreadableError, read_verdicts
from surogate.config.job import resolve_job
from surogate.errors import InvalidInputError
from surogate.structs import from_struct, to_struct
from surogate.v1 import common_pb2, inference_pb2, inference_pb2_grpc, reward_pb2
from tests.helpers.grpo.grpo_job import job_config
from tests.helpers.reward.judge_server import JudgeServer, completion, judge_server, material, scores
from tests.helpers.reward.rewards import group, outcomes, reward_stub
from tests.helpers.rpc import serving


def args(judge: JudgeServer | str, **others: Any) -> dict[str, Any]:
    url = judge if isinstance(judge, str) else judge.url
    return {"base_url": url, "model": "m", "max_retries": 1, "max_retries_on_parse_error": 1, **others}


async def judged(*completions: str, given: dict[str, Any], **others: Any) -> reward_pb2.ScoreRolloutsResponse:
    async with reward_stub(Judge()) as stub:
        return await stub.ScoreRollouts(group("judge", *completions, args=given, **others))


async def test_each_answer_alone() -> None:
    def answer(request: dict[str, Any]) -> str:
        (item,) = material(request)["answers"]
        return f"I think {{so}}. {scores(len(item['answer']) / 10)}"

    with judge_server(answer) as judge:
        response = await judged("a", "abc", "a", given=args(judge, rubric="Be long."), answer="ref")
        assert outcomes(response) == [0.1, 0.3, 0.1]
        assert response.results[1].score.explanation == "r1"
        assert len(judge.requests) == 2, "equal answers are judged once"
        assert {material(request)["reference"] for request in judge.requests} == {"ref"}
        assert all("Be long." in request["messages"][0]["content"] for request in judge.requests)
        assert judge.keys == [None, None]


async def test_all_of_a_group_against_each_other_with_their_cost() -> None:
    before = TOKENS.labels("m", "input")._value.get()
    with judge_server(
        lambda request: scores(*(len(item["answer"]) / 4 for item in material(request)["answers"]))
    ) as judge:
        prices = {"input_per_million": 2.0, "output_per_million": 10.0}
        response = await judged("a", "ab", "ab", "abcd", given=args(judge, relative=True, cost=prices))
        assert outcomes(response) == [0.25, 0.5, 0.5, 1.0]
        assert [item["id"] for item in material(judge.requests[0])["answers"]] == [1, 2, 3]
    components = [dict(result.score.components) for result in response.results]
    assert sum(part["input_tokens"] for part in components) == pytest.approx(1000)
    assert sum(part["output_tokens"] for part in components) == pytest.approx(100)
    assert sum(part["cost"] for part in components) == pytest.approx(0.002 + 0.001)
    assert TOKENS.labels("m", "input")._value.get() == before + 1000


async def test_an_episode_is_shown_whole() -> None:
    with judge_server(lambda request: scores(1)) as judge:
        request = group("judge", "7", args=args(judge))
        request.rollouts[0].messages.add(role="assistant", content="5")
        request.rollouts[0].messages.add(role="user", content="Higher.")
        request.rollouts[0].messages.add(role="assistant", content="7")
        async with reward_stub(Judge()) as stub:
            assert outcomes(await stub.ScoreRollouts(request)) == [1.0]
        (answer,) = material(judge.requests[0])["answers"]
        assert [message["content"] for message in answer["answer"]] == ["5", "Higher.", "7"]


async def test_an_answer_that_cannot_be_read_is_asked_for_again() -> None:
    said = iter(["Great!", scores(0.5)])
    with judge_server(lambda request: next(said)) as judge:
        assert outcomes(await judged("x", given=args(judge))) == [0.5]
        assert [message["role"] for message in judge.requests[1]["messages"]] == ["system", "user", "assistant", "user"]
        assert "no JSON object" in judge.requests[1]["messages"][-1]["content"]


async def test_what_stays_unreadable_is_an_error_and_no_reward() -> None:
    with judge_server(lambda request: scores(7)) as judge:
        response = await judged("x", "y", given=args(judge, relative=True))
        assert outcomes(response) == ["JUDGE_FAILED"] * 2
        assert "could not be read, 2 times" in response.results[0].error.message
        assert len(judge.requests) == 2


async def test_one_that_fails_costs_only_its_own_rollout() -> None:
    def answer(request: dict[str, Any]) -> Any:
        return (400, {}, "no") if material(request)["answers"][0]["answer"] == "bad" else scores(1)

    with judge_server(answer) as judge:
        assert outcomes(await judged("good", "bad", given=args(judge))) == [1.0, "JUDGE_FAILED"]


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_busy_endpoint_is_asked_again(status: int) -> None:
    said = iter([(status, {"retry-after": "0"}, "busy"), scores(0.25)])
    with judge_server(lambda request: next(said)) as judge:
        assert outcomes(await judged("x", given=args(judge))) == [0.25]


async def test_where_one_url_fails_the_next_is_asked() -> None:
    with judge_server(lambda request: scores(1)) as judge:
        urls = ["http://127.0.0.1:9/v1", judge.url]
        assert outcomes(await judged("x", "y", given=args("", max_retries=1) | {"base_url": urls})) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((401, {}, "who?"), "401: who? (the key is the environment variable TEST_API_KEY"),
        ((200, {}, "<html>"), "something other than a chat completion"),
        ((200, {}, '{"choices": []}'), "something other than a chat completion"),
        ((200, {}, '{"choices": ' + "[" * 100_000), "something other than a chat completion"),
        ((200, {}, "x" * (5 << 20)), "more than 4 MiB"),
        ((500, {"retry-after": "0"}, "oh"), "failed 2 times; the last time: "),
        ((200, {"content-length": "5000"}, "cut"), "failed 2 times"),
    ],
)
async def test_failures_are_told(answer: Any, why: str) -> None:
    with judge_server(lambda request: answer) as judge:
        response = await judged("x", given=args(judge, api_key_var="TEST_API_KEY"))
        assert outcomes(response) == ["JUDGE_FAILED"]
        assert why in response.results[0].error.message


@pytest.mark.parametrize("used", ["-5", "Infinity", "1" + "0" * 400, '"many"', "null", "[1]"])
async def test_tokens_that_cannot_be_are_not_counted(used: str) -> None:
    said = completion(scores(0.5)).replace("1000", used)
    with judge_server(lambda request: (200, {}, said)) as judge:
        response = await judged("x", given=args(judge))
        assert outcomes(response) == [0.5]
        assert response.results[0].score.components["input_tokens"] == 0


def test_a_reason_may_have_half_a_character_and_has_an_end() -> None:
    (verdict,) = read_verdicts('{"scores": [{"id": 1, "score": 1, "reason": "\\ud800' + "x" * 5000 + '"}]}', 1)
    assert verdict.reason.startswith("?x") and len(verdict.reason) == 1000


def test_as_many_verdicts_as_fit_are_read_after_thoughts_full_of_braces() -> None:
    text = "{" * 5000 + scores(*[0.5] * 256)
    assert len(read_verdicts(text, 256)) == 256


async def test_an_endpoint_that_hangs_is_given_up() -> None:
    def answer(request: dict[str, Any]) -> str:
        time.sleep(1.0)
        return scores(1)

    with judge_server(answer) as judge:
        response = await judged("x", given=args(judge, request_timeout=0.2))
        assert "did not answer within 0.2 s" in response.results[0].error.message


async def test_no_more_requests_at_once_than_allowed() -> None:
    def answer(request: dict[str, Any]) -> str:
        time.sleep(0.05)
        return scores(1)

    with judge_server(answer) as judge:
        given = args(judge, max_concurrent=2)
        assert outcomes(await judged(*map(str, range(8)), given=given)) == [1.0] * 8
        assert judge.most_at_once <= 2


async def test_the_key_comes_from_the_environment_and_only_keys_may_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_API_KEY", "s3cret")
    with judge_server(lambda request: scores(1)) as judge:
        await judged("x", given=args(judge, api_key_var="TEST_API_KEY"))
        assert judge.keys == ["Bearer s3cret"]
    for name in ("SUROGATE_TOKEN", "AWS_SECRET_ACCESS_KEY", "HOME"):
        with pytest.raises(InvalidInputError, match="api_key_var"):
            Judge().parse(args("http://x/v1", api_key_var=name))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"base_url": "ftp://x"}, r"env\[\]\.args\.base_url"),
        ({"base_url": "http://user:password@x/v1"}, "base_url"),  # pragma: allowlist secret
        ({"base_url": []}, "base_url"),
        ({"model": None}, "model is required"),
        ({"base_url": "grpc://h:1", "sampling": {"wrong": 1}}, "no such sampling"),
        ({"cost": {"per_word": 1}}, "cost"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidInputError, match=why):
        Judge().parse({**args("http://x/v1"), **changes})


def test_the_keys_of_orch_yaml_are_arguments_of_the_environment() -> None:
    ruler = {
        "enabled": True,
        "judge": {"base_url": ["https://a/v1", "grpc://b:1"], "max_retries": 3, "api_key_var": "MY_API_KEY"},
        "judge_model": "big",
        "rubric": "Be kind.",
        "request_timeout": 7,
        "max_retries_on_parse_error": 1,
        "max_concurrent_judges": 5,
        "sampling": {"temperature": 0.5},
        "cost": {"input_per_million": 3},
    }
    spec = read_settings(resolve_job(job_config("m", ruler=ruler))).ruler
    assert spec is not None
    assert (spec.mode, spec.max_concurrent, spec.judge.timeout) == ("replace", 5, 14)
    found = Judge().parse(from_struct(to_struct(spec.judge.args)))
    assert found.relative
    assert (found.model, found.rubric, found.max_concurrent) == ("big", "Be kind.", 5)
    assert (found.endpoint.max_retries, found.endpoint.timeout, found.endpoint.key_name) == (3, 7.0, "MY_API_KEY")
    assert found.cost.of(Reply("", 1_000_000, 5)) == 3.0
    assert read_settings(resolve_job(job_config("m"))).ruler is None


class Speaker(inference_pb2_grpc.InferenceServiceServicer):
    """An inference service that judges."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.StreamGenerateRequest] = []

    async def StreamGenerate(
        self, request: inference_pb2.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        self.requests.append(request)
        text = scores(0.25, 0.75)
        yield inference_pb2.StreamGenerateResponse(text=text[:20], token_ids=[1, 2, 3])
        yield inference_pb2.StreamGenerateResponse(
            text=text[20:], token_ids=[4], finish_reason=common_pb2.FINISH_REASON_STOP, prompt_tokens=10
        )


async def test_an_inference_service_of_ours_judges_too() -> None:
    speaker = Speaker()
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    async with serving(lambda server: server.add(add, speaker, "surogate.v1.InferenceService")) as server:
        given = args(f"grpc://{server.address}", relative=True, sampling={"max_tokens": 500, "temperature": 0})
        response = await judged("x", "y", given=given)
        assert outcomes(response) == [0.25, 0.75]
        parts = response.results[0].score.components
        assert (parts["input_tokens"], parts["output_tokens"]) == (5, 2)
        (request,) = speaker.requests
        assert [message.role for message in request.conversation.messages] == ["system", "user"]
        assert (request.sampling.max_tokens, request.sampling.temperature) == (500, 0)
    gone = await judged("x", given=given | {"max_retries": 0})
    assert outcomes(gone) == ["JUDGE_FAILED"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no JSON object"),
        ('{"scores": []}', "no score for 1, 2"),
        (scores(1), "no score for 2"),
        (scores(1, 1, 1), "no answer 3"),
        ('{"scores": [{"id": 1, "score": 1}, {"id": 1, "score": 1}]}', "twice"),
        ('{"scores": [1, 2]}', "no answer None"),
        (scores(1, -0.1), "score of 2 is -0.1"),
        (scores(1, True), "score of 2 is True"),
        (scores(1, "1"), "score of 2 is '1'"),
        (scores(1, float("nan")), "score of 2 is nan"),
        ('{"scores":' * 5000, "no JSON object"),
    ],
)
def test_answers_that_cannot_be_read(text: str, why: str) -> None:
    with pytest.raises(UnreadableError, match=why):
        read_verdicts(text, 2)


def test_the_last_scores_count() -> None:
    text = f'First {scores(0, 0)}; {{"other": {{}}}} but then ```json\n{scores(1, 0.5)}\n``` done'
    assert [verdict.score for verdict in read_verdicts(text, 2)] == [1.0, 0.5]
