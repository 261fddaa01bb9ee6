"""`surogate reward check` against the built-in environments, and against services that each do one thing wrong."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from reward_svc.environments.arithmetic import Arithmetic
from reward_svc.environments.exact_match import ExactMatch
from reward_svc.environments.guess_number import GuessNumber
from reward_svc.environments.regex_match import RegexMatch
from reward_svc.environments.reverse_text import ReverseText
from reward_svc.environments.shaping import Format, Length
from surogate.errors import NotFoundError, UnavailableError
from surogate.reward.conformance import Report, Verdict, Wishes, check_service
from surogate.rpc.channel import ClientSecurity
from tests.helpers.reward import broken_rewards as broken
from tests.helpers.reward.rewards import reward_server

SMALL_MESSAGES = [("grpc.max_receive_message_length", 4 * 2**20)]


async def checked(address: str, **wishes: Any) -> Report:
    return await check_service(address, Wishes(**{"item_timeout": 2.0, **wishes}), ClientSecurity())


def named(report: Report, verdict: Verdict) -> set[str]:
    return {finding.check for finding in report.findings if finding.verdict is verdict}


async def test_the_built_in_environments_have_nothing_to_be_advised_on() -> None:
    built_in = (ReverseText(), Arithmetic(), ExactMatch(), RegexMatch(), Format(), Length(), GuessNumber())
    async with reward_server(*built_in) as address:
        report = await checked(address, item_timeout=30.0)
    assert report.ok
    assert not named(report, Verdict.FAIL) | named(report, Verdict.ADVICE)
    assert report.environments == [environment.id for environment in built_in]
    (turns,) = [finding for finding in report.findings if finding.check == "turns"]
    assert (turns.environment, turns.verdict) == ("guess-number", Verdict.OK)
    made = {finding.check for finding in report.findings if finding.environment == "reverse-text"}
    assert {"scores", "concurrency", "deadline", "cancelled", "large-message", "count", "finite"} <= made


async def test_what_needs_arguments_is_checked_with_them(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    async with reward_server(ExactMatch(), RegexMatch()) as address:
        without = await checked(address, environment="regex")
        report = await checked(
            address, environment="regex", args={"dataset": str(tmp_path / "rows.jsonl"), "pattern": "answer"}
        )
    assert named(without, Verdict.FAIL) == {"scores"}
    assert report.ok and "examples" in named(report, Verdict.OK)


async def test_a_plain_service_is_only_advised_on_health_and_reflection() -> None:
    async with broken.serving(broken.GoodReward()) as address:
        report = await checked(address)
    assert report.ok
    assert named(report, Verdict.ADVICE) == {"health", "reflection"}


@pytest.mark.parametrize(
    ("service", "check"),
    [
        (broken.OneShort, "count"),
        (broken.Sorted, "order"),
        (broken.OwnIds, "ids"),
        (broken.Twice, "ids"),
        (broken.ByPosition, "position"),
        (broken.Silent, "outcome"),
        (broken.NoCode, "error-code"),
        (broken.Nan, "finite"),
        (broken.Percent, "bounds"),
        (broken.Noisy, "repeats"),
        (broken.FailsOnEmpty, "empty"),
        (broken.FailsOnUnicode, "unicode"),
        (broken.GroupFails, "isolation"),
        (broken.Slow, "deadline"),
        (broken.Shared, "concurrency"),
        (broken.LeaksLocks, "cancelled"),
        (broken.AnyEnvironment, "unknown-environment"),
        (broken.Nameless, "listing"),
        (broken.Upside, "listing"),
    ],
)
async def test_what_is_wrong_is_named(service: type[broken.GoodReward], check: str) -> None:
    async with broken.serving(service()) as address:
        report = await checked(address, item_timeout=0.5)
    assert not report.ok
    assert check in named(report, Verdict.FAIL)
    assert all(finding.where and finding.do for finding in report.findings if finding.verdict is Verdict.FAIL)


async def test_prompts_in_no_fixed_order_are_named() -> None:
    async with broken.serving(broken.WithPrompts(), broken.ShuffledPrompts()) as address:
        report = await checked(address)
    assert named(report, Verdict.FAIL) == {"examples"}


@pytest.mark.parametrize(
    ("prompts", "said"),
    [(broken.ShuffledPrompts, "UNIMPLEMENTED"), (broken.ForgetfulTurns, "the same turn was answered differently")],
)
async def test_turns_that_are_promised_and_not_answered_are_named(prompts: type[Any], said: str) -> None:
    async with broken.serving(broken.WithTurns(), prompts()) as address:
        report = await checked(address)
    (turns,) = [finding for finding in report.findings if finding.check == "turns"]
    assert turns.verdict is Verdict.FAIL and said in turns.what


async def test_a_server_that_takes_only_4_mib_is_named() -> None:
    async with broken.serving(broken.GoodReward(), options=SMALL_MESSAGES) as address:
        report = await checked(address)
    assert named(report, Verdict.FAIL) == {"large-message"}


@pytest.mark.parametrize(("service", "check"), [(broken.HonestlyNoisy, "repeats"), (broken.OneAtATime, "concurrency")])
async def test_what_jobs_can_live_with_is_advice(service: type[broken.GoodReward], check: str) -> None:
    async with broken.serving(service()) as address:
        report = await checked(address)
    assert report.ok
    assert check in named(report, Verdict.ADVICE)


async def test_a_service_that_ends_is_named_and_asked_no_more() -> None:
    async with broken.serving(broken.Ends()) as address:
        report = await checked(address)
        assert {"empty", "alive"} <= named(report, Verdict.FAIL)
        assert "unicode" not in {finding.check for finding in report.findings}
        with pytest.raises(UnavailableError):
            await checked(address)


async def test_an_environment_that_is_not_there() -> None:
    async with broken.serving(broken.GoodReward()) as address:
        with pytest.raises(NotFoundError, match="it has vowels"):
            await checked(address, environment="consonants")


async def command(*arguments: str) -> tuple[int, str, str]:
    """`surogate reward check ARGUMENTS`; returns exit code, output and errors."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "surogate.cli.main", "reward", "check", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_the_command_says_what_where_and_what_to_do() -> None:
    async with broken.serving(broken.Nan()) as address:
        code, out, _ = await command(address)
        assert code == 1
        assert "fail     finite" in out
        assert "where: ScoreRolloutsResponse.results[].score, empty completions" in out
        assert "do: answer `error` where a reward cannot be computed" in out
        code, out, _ = await command(address, "--env", "vowels", "--json")
        found = json.loads(out)
        assert code == 1 and not found["ok"] and found["counts"]["fail"] == 1
        assert [item["check"] for item in found["findings"] if item["verdict"] == "fail"] == ["finite"]


async def test_the_command_exits_0_1_or_2() -> None:
    async with broken.serving(broken.GoodReward()) as address:
        assert (await command(address))[0] == 0
        code, _, err = await command(address, "--env", "consonants")
        assert code == 2 and "it has vowels" in err
    code, _, err = await command("nowhere")
    assert code == 2 and "HOST:PORT" in err
    code, _, err = await command("127.0.0.1:1")
    assert code == 1 and "cannot reach the reward service" in err and "Traceback" not in err
