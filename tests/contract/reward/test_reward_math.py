"""`math` over gRPC: what counts as equal, and hostile expressions, which cost only themselves."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from reward_svc.environments.mathematics import Math
from tests.helpers.reward.rewards import group, outcomes, reward_stub
from tests.helpers.waiting import until


@pytest.fixture
async def stub() -> AsyncIterator[Any]:
    async with reward_stub(Math(2)) as stub:
        yield stub


EQUAL = [
    ("42", "The answer is 42."),
    ("42", r"Therefore \boxed{42}, not 41."),
    ("1,234", "1234"),
    (r"\frac{1}{2}", "so it is 0.5"),
    ("$\\frac12$", r"\boxed{\frac{2}{4}}"),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}"),
    ("5 cm", r"It is $5\,\text{cm}$."),
    ("5", "5 cm"),
    ("50%", r"$50\%$"),
    ("x=3", "$3$"),
    (r"x^2+2x+1", r"$(x+1)^2$"),
    (r"(1,2)", "$(1,2)$"),
    (r"\{1,2\}", r"$\{2,1\}$"),
    ("2", r"\boxed{1}, wait, \boxed{2}"),
    (r"\frac{\pi}{4}", r"$\pi/4$"),
    ("0.333333", r"$\frac{1}{3}$"),
]
DIFFERENT = [
    ("42", "41"),
    ("42", ""),
    ("42", "no idea"),
    (r"\frac{1}{2}", "0.51"),
    ("3", "\\boxed{3}\\boxed{4}"),
    ("x", "y"),
]
HOSTILE = [
    r"$9^{9^{9^{9^9}}}$",
    r"\boxed{10000000!}",
    r"\boxed{\sum_{n=1}^{10000000} \frac{1}{n}}",
    "9**9**9**9**9",
    r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    r"$" + r"\frac{1}{" * 400 + "1" + "}" * 400 + "$",
    r"\boxed{__import__('os').system('touch escaped')}",
]


async def test_equal_and_different(stub: Any) -> None:
    wrong = []
    for answer, completion, expected in [(*pair, 1.0) for pair in EQUAL] + [(*pair, 0.0) for pair in DIFFERENT]:
        found = outcomes(await stub.ScoreRollouts(group("math", completion, answer=answer)))
        wrong += [(answer, completion, found)] if found != [expected] else []
    assert not wrong


async def test_where_the_answer_stands(stub: Any) -> None:
    request = group("math", "7 #### 8", "8", answer="8", args={"answer_prefix": "####"})
    assert outcomes(await stub.ScoreRollouts(request)) == [1.0, 0.0]
    request = group("math", "8", r"\boxed{8}", answer="8", args={"boxed": True})
    assert outcomes(await stub.ScoreRollouts(request)) == [0.0, 1.0]


async def test_an_answer_that_is_no_mathematics_is_an_error(stub: Any) -> None:
    response = await stub.ScoreRollouts(group("math", "42", answer="§ ¶"))
    assert outcomes(response) == ["INVALID_INPUT"]
    assert "cannot read the answer '§ ¶'" in response.results[0].error.message


async def test_hostile_expressions_earn_nothing_and_delay_nobody(stub: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = asyncio.ensure_future(stub.ScoreRollouts(group("math", *HOSTILE, answer="5", args={"timeout": 1.0})))
    assert outcomes(await stub.ScoreRollouts(group("math", "5", answer="5"))) == [1.0]
    found = outcomes(await hostile)
    assert set(found) <= {0.0, "DEADLINE_EXCEEDED", "INTERNAL"}
    assert "DEADLINE_EXCEEDED" in found  # there was something to survive
    assert not (tmp_path / "escaped").exists()


async def test_no_worker_is_left_behind() -> None:
    math = Math(1)
    async with reward_stub(math) as stub:
        assert outcomes(await stub.ScoreRollouts(group("math", "5", answer="5"))) == [1.0]
        (worker,) = math._pool._alive
    await until(lambda: not _runs(worker.pid))


def _runs(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
