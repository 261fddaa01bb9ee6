"""The orchestrator's side of scoring against services that misbehave, over real sockets: each is refused by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import duration_pb2
from google.protobuf.struct_pb2 import Struct
from google.rpc import error_details_pb2, status_pb2

from orchestrator_svc.grpo.configured.setup import service_security
from orchestrator_svc.grpo.fatal import FATAL
from orchestrator_svc.grpo.groups import Rollout
from orchestrator_svc.grpo.rewards.answers import MAX_COMPONENTS
from orchestrator_svc.grpo.rewards.scoring import Environment, Scorer
from orchestrator_svc.grpo.rewards.services import Custom
from surogate.config.env import EnvConfig
from surogate.errors import (
    BusyError,
    ConfigError,
    DataLossError,
    DeadlineError,
    SurogateError,
    UnauthenticatedError,
    UnavailableError,
)
from surogate.reward import reward
from surogate.rpc.channel import ClientSecurity
from surogate.rpc.status import trailing_metadata
from surogate.v1 import common_pb2, reward_pb2
from tests.helpers.certificates import Authority
from tests.helpers.reward import broken_rewards as broken
from tests.helpers.reward.rewards import reward_server
from tests.helpers.waiting import PATIENCE

TEXTS = ("aeiou", "abcd", "xyz", "banana")
VOWELS = [1.0, 0.25, 0.0, 0.5]


def rollouts(group: str, *texts: str) -> list[Rollout]:
    ids = np.ones(1, np.int32)
    stop = common_pb2.FINISH_REASON_STOP
    return [Rollout(f"{group}-{i}", ids, np.zeros(1, np.float32), stop, [], text=text) for i, text in enumerate(texts)]


@asynccontextmanager
async def scorer(
    address: str, *, security: ClientSecurity | None = None, timeout: float = 10.0
) -> AsyncIterator[tuple[Scorer, Environment]]:
    """What scores the groups of a job whose environment is at `address`."""
    endpoint = Custom(address, security or ClientSecurity())
    environment = Environment("vowels", "vowels", Struct(), endpoint, timeout)
    try:
        yield Scorer({"vowels": environment}, job="test", patience=0.5), environment
    finally:
        await endpoint.close()


async def scored(address: str, *texts: str, group: str = "g", **settings: Any) -> tuple[list[Rollout], str]:
    async with scorer(address, **settings) as (asking, environment):
        found = await asking.score(environment, reward_pb2.Example(id="0"), group, rollouts(group, *(texts or TEXTS)))
        return found.rollouts, found.problem


async def test_a_service_that_keeps_to_the_contract_is_believed() -> None:
    async with broken.serving(broken.GoodReward()) as address:
        found, problem = await scored(address)
    assert [rollout.reward for rollout in found] == VOWELS
    assert problem == ""


class OfTheLastRequest(broken.GoodReward):
    """Answers what was asked before, as a queue does that lost count."""

    last = reward_pb2.ScoreRolloutsResponse()

    async def ScoreRollouts(self, request: Any, context: Any) -> reward_pb2.ScoreRolloutsResponse:
        self.last, answer = await super().ScoreRollouts(request, context), self.last
        return answer


@pytest.mark.parametrize(
    ("service", "reason", "said"),
    [
        (broken.OneShort, "WRONG_REWARD_COUNT", "was asked about 4 rollouts and answered 3"),
        (broken.Sorted, "WRONG_ORDER", "another order"),
        (broken.OwnIds, "WRONG_ROLLOUT", "about rollout '0', which it was not asked about"),
        (broken.Twice, "ROLLOUT_TWICE", "twice about rollout 'g-0'"),
        (OfTheLastRequest, "WRONG_REWARD_COUNT", "answered 0"),
    ],
)
async def test_an_answer_about_something_else_is_refused(
    service: type[broken.GoodReward], reason: str, said: str
) -> None:
    async with broken.serving(service()) as address:
        with pytest.raises(DataLossError, match=said) as caught:
            await scored(address, "abcd", "xyz", "banana", "aeiou")
    assert caught.value.reason == reason
    assert str(caught.value).startswith("environment vowels: the reward service ")


async def test_the_answer_to_another_request_is_refused() -> None:
    async with broken.serving(OfTheLastRequest()) as address, scorer(address) as (asking, environment):
        example = reward_pb2.Example(id="0")
        with pytest.raises(DataLossError):
            await asking.score(environment, example, "g1", rollouts("g1", *TEXTS))
        with pytest.raises(DataLossError, match="'g1-0', which it was not asked about") as caught:
            await asking.score(environment, example, "g2", rollouts("g2", *TEXTS))
    assert caught.value.reason == "WRONG_ROLLOUT"


class Components(broken.GoodReward):
    """Components that cannot be, by completion."""

    async def result(self, rollout: reward_pb2.Rollout) -> reward_pb2.RolloutResult:
        result = await super().result(rollout)
        parts = {
            "nan": {"part": float("nan")},
            "vast": {"part": -1e300},
            "many": {str(number): 1.0 for number in range(MAX_COMPONENTS + 1)},
            "long": {"n" * 1000: 1.0},
        }
        for name, value in parts.get(rollout.completion, {"part": 1.0}).items():
            result.score.components[name] = value
        return result


class Immense(broken.GoodReward):
    """Gives a reward whose square is infinite."""

    def reward(self, text: str) -> float:
        return 1.7e308 if text == "vast" else super().reward(text)


class Garbled(broken.GoodReward):
    """Explains its errors by what cannot be read, would colour a terminal, or never ends."""

    async def result(self, rollout: reward_pb2.Rollout) -> reward_pb2.RolloutResult:
        said = {"garbled": "no \x1b[31mvowels", "wordy": "x" * 1_000_000}.get(rollout.completion)
        if said is None:
            return await super().result(rollout)
        result = reward_pb2.RolloutResult(rollout_id=rollout.rollout_id)
        result.error.code, result.error.message = 13, said
        result.error.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
        return result


@pytest.mark.parametrize(
    ("service", "bad", "said"),
    [
        (broken.Nan, " ", "the reward of rollout g-1 is nan"),
        (broken.Silent, "xyz", "g-1 was answered with neither a score nor an error"),
        (broken.NoCode, " ", "g-1 could not be scored: nothing to score"),
        (Immense, "vast", "the reward of rollout g-1 is 1.7e+308, beyond 1e+15"),
        (Garbled, "garbled", "g-1 could not be scored: no \\x1b[31mvowels"),
        (Garbled, "wordy", "g-1 could not be scored: xxxxxxxx"),
        (Components, "nan", "the component 'part' of rollout g-1 is nan"),
        (Components, "vast", "the component 'part' of rollout g-1 is -1e+300, beyond 1e+15"),
        (Components, "many", "g-1 has 65 components, more than 64"),
        (Components, "long", "a component of rollout g-1 has a name of 1000 characters"),
    ],
)
async def test_a_rollout_that_was_not_rightly_scored_is_left_out(
    service: type[broken.GoodReward], bad: str, said: str
) -> None:
    async with broken.serving(service()) as address:
        found, problem = await scored(address, "aeiou", bad, "banana")
    assert [rollout.reward for rollout in found] == [1.0, 0.5]
    assert said in problem and problem.startswith("environment vowels: ")
    assert len(problem) < 1000


class Busy(broken.GoodReward):
    """Is full, and says to come again at once."""

    asked = 0

    async def ScoreRollouts(self, request: Any, context: Any) -> reward_pb2.ScoreRolloutsResponse:
        self.asked += 1
        return await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", trailing_metadata(_full()))


def _full() -> status_pb2.Status:
    status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="full")
    soon = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=1))
    status.details.add().Pack(soon)
    return status


async def test_a_full_service_is_not_flooded() -> None:
    service = Busy()
    async with broken.serving(service) as address:
        with pytest.raises(BusyError, match=r"environment vowels: .* full"):
            await scored(address)
    assert service.asked <= 6  # in half a second, with a tenth between


class Refusing(broken.GoodReward):
    """Refuses every second group: its keys are being replaced."""

    asked = 0

    async def ScoreRollouts(self, request: Any, context: Any) -> reward_pb2.ScoreRolloutsResponse:
        self.asked += 1
        if self.asked % 2 == 0:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
        return await super().ScoreRollouts(request, context)


async def test_what_a_service_refuses_that_scored_before_costs_one_group() -> None:
    async with broken.serving(Refusing()) as address, scorer(address) as (asking, environment):
        for number in (1, 3):
            await asking.score(environment, reward_pb2.Example(id="0"), f"g{number}", rollouts("g", *TEXTS))
            with pytest.raises(SurogateError, match=r"environment vowels: .* who are you") as caught:
                await asking.score(environment, reward_pb2.Example(id="0"), f"g{number + 1}", rollouts("g", *TEXTS))
            assert not isinstance(caught.value, FATAL)
            assert caught.value.reason == "UNAUTHENTICATED"


class Late(broken.GoodReward):
    """Answers when nobody waits any more."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    async def ScoreRollouts(self, request: Any, context: Any) -> reward_pb2.ScoreRolloutsResponse:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return await super().ScoreRollouts(request, context)


async def test_a_late_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator_svc.grpo.rewards.scoring.GRACE", 1.0)
    service = Late()
    async with broken.serving(service) as address:
        with pytest.raises(DeadlineError, match=r"environment vowels: .* did not answer within 3 s"):
            await scored(address, timeout=1.0)
        await asyncio.wait_for(service.cancelled.wait(), PATIENCE)


class Huge(broken.GoodReward):
    """Explains a reward by more than a message may have."""

    async def result(self, rollout: reward_pb2.Rollout) -> reward_pb2.RolloutResult:
        result = await super().result(rollout)
        result.score.explanation = "x" * (17 * 2**20)
        return result


async def test_an_answer_of_more_than_64_mib_is_refused() -> None:
    unbounded = [("grpc.max_send_message_length", -1)]
    async with broken.serving(Huge(), options=unbounded) as address:
        with pytest.raises(SurogateError, match=r"environment vowels: .* larger than max") as caught:
            await scored(address, timeout=120.0)  # it is about the size: a busy machine may take its time
    assert caught.value.reason == "MESSAGE_TOO_LARGE"


def _field(number: int, content: bytes) -> bytes:
    """A field of a message as it is on the wire."""
    size, length = bytearray(), len(content)
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2]) + bytes(size) + bytes([length]) + content


def _nested(levels: int) -> bytes:
    """A `Struct` in a `Struct` in a … on the wire."""
    content = b""
    for _ in range(levels):
        content = _field(1, _field(1, b"a") + _field(2, _field(5, content)))
    return content


class Raw(grpc.GenericRpcHandler):
    """Answers every call with the same bytes."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def service(self, _: Any) -> Any:
        async def answer(request: bytes, context: Any) -> bytes:
            return self._content

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.mark.parametrize(
    "content", [b"\xff" * 9, _field(1, b"\xff"), _field(1, _nested(1000)), _field(2, _nested(1000))]
)
async def test_an_answer_that_is_no_message_is_refused(content: bytes) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([Raw(content)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with scorer(f"127.0.0.1:{port}") as (asking, environment):
        if content[0] != 2 << 3 | 2:
            with pytest.raises(DataLossError, match=r"environment vowels: .* failed: .* cannot be read"):
                await asking.score(environment, reward_pb2.Example(id="0"), "g", rollouts("g", *TEXTS))
        with pytest.raises(DataLossError, match=r"environment vowels: .* cannot be read"):
            await asking.take_turn(environment, reward_pb2.TakeTurnRequest(rollout_id="g-0", turn=1))
    await server.stop(None)


@reward("vowels")
def vowels(completion: str) -> float:
    """Share of vowels."""
    return sum(char in "aeiou" for char in completion) / len(completion)


def at(address: str, **keys: Any) -> ClientSecurity:
    """How the orchestrator shows itself to a service that is configured so in orch.yaml."""
    return service_security(EnvConfig.model_validate({"id": "vowels", "address": address, **keys}), "orch.env.0")


async def test_tokens_between_orchestrator_and_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKENS", "right")
    monkeypatch.setenv("JOB_TOKEN", "right")
    monkeypatch.setenv("WRONG_TOKEN", "wrong")
    async with reward_server(vowels, token_env="REWARD_TOKENS") as address:
        found, _ = await scored(address, security=at(address, token_env="JOB_TOKEN"))
        assert [rollout.reward for rollout in found] == VOWELS
        for security in (at(address), at(address, token_env="WRONG_TOKEN")):
            with pytest.raises(UnauthenticatedError, match="environment vowels: "):
                await scored(address, security=security)
        with pytest.raises(ConfigError, match=r"orch\.env\.0\.token_env"):
            at(address, token_env="NO_SUCH_VARIABLE")


async def test_the_orchestrators_own_token_never_goes_to_a_custom_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUROGATE_TOKEN", "the orchestrator's")
    monkeypatch.setenv("SUROGATE_TOKEN_FILE", "/no/such/file")
    seen: list[tuple[str, str]] = []

    class Curious(broken.GoodReward):
        async def ScoreRollouts(self, request: Any, context: Any) -> reward_pb2.ScoreRolloutsResponse:
            seen.extend(context.invocation_metadata())
            return await super().ScoreRollouts(request, context)

    async with broken.serving(Curious()) as address:
        await scored(address, security=at(address))
    assert seen and not [value for name, value in seen if name == "authorization"]


async def test_tls_and_mtls_between_orchestrator_and_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    server, client = authority.issue("server"), authority.issue("client")
    monkeypatch.setenv("SUROGATE_TLS_CA", str(authority.cert))
    files = {"tls_cert": server.cert, "tls_key": server.key}
    async with reward_server(vowels, **files) as address:
        found, _ = await scored(address, security=at(address, tls=True))
        assert [rollout.reward for rollout in found] == VOWELS
        with pytest.raises(UnavailableError, match="environment vowels: "):
            await scored(address, security=at(address))  # in the clear
        monkeypatch.setenv("SUROGATE_TLS_CA", str(other.cert))
        with pytest.raises(UnavailableError, match="environment vowels: "):
            await scored(address, security=at(address, tls=True))
    monkeypatch.setenv("SUROGATE_TLS_CA", str(authority.cert))
    async with reward_server(vowels, **files, tls_client_ca=authority.cert) as address:
        with pytest.raises(UnavailableError, match="environment vowels: "):
            await scored(address, security=at(address, tls=True))
        monkeypatch.setenv("SUROGATE_TLS_CERT", str(client.cert))
        monkeypatch.setenv("SUROGATE_TLS_KEY", str(client.key))
        found, _ = await scored(address, security=at(address, tls=True))
        assert [rollout.reward for rollout in found] == VOWELS
