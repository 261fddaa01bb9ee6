"""`code` over gRPC: programs that are right, partly right and wrong, in every form that tests have."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from reward_svc.environments.code import Code, program_of
from reward_svc.sandbox import launch
from reward_svc.sandbox.launch import Sandbox
from surogate.errors import FailedPreconditionError
from tests.contract.test_reward_code_attacks import no_sandbox
from tests.helpers.rewards import group, outcomes, reward_stub

needs_sandbox = pytest.mark.skipif(bool(no_sandbox()), reason=no_sandbox() or "there is a sandbox")
ARGS = {"timeout": 20}

ADD = "def add(a, b):\n    return a + b"
STACK = """
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item)
    def pop(self):
        if not self.items: raise IndexError('empty')
        return self.items.pop()
    def __len__(self): return len(self.items)
"""


@pytest.fixture
async def stub() -> AsyncIterator[Any]:
    async with reward_stub(Code(2), item_timeout=100) as stub:
        yield stub


def test_the_program_is_the_last_fenced_block() -> None:
    assert program_of("Try\n```python\nx = 1\n```\nor\n```\nx = 2\n```\nDone") == "x = 2\n"
    assert program_of("x = 3") == "x = 3"


@needs_sandbox
async def test_input_and_output_with_partial_credit(stub: Any) -> None:
    tests = {"inputs": ["1 2\n", "5 5\n"], "outputs": ["3\n", "10"]}
    programs = ["print(sum(map(int, input().split())))", "input(); print(3)", "print(", "1/0"]
    response = await stub.ScoreRollouts(group("code", *programs, args=ARGS, fields={"tests": tests}))
    assert outcomes(response) == [1.0, 0.5, 0.0, 0.0]
    assert "test 2 of 2: printed something else" in response.results[1].score.explanation
    request = group("code", programs[1], args=ARGS | {"partial": False}, fields={"tests": tests})
    assert outcomes(await stub.ScoreRollouts(request)) == [0.0]


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "fields", "expected"),
    [
        (ADD, {"tests": ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert add(1, 1) == 3"]}, 2 / 3),
        (ADD, {"tests": "def check(candidate):\n    assert candidate([1], [2]) == [1, 2]", "entry_point": "add"}, 1.0),
        (ADD, {"tests": ["assert total == 3"], "setup": "total = add(1, 2)"}, 1.0),
        (ADD, {"tests": ["try:\n    add(1, 'x')\nexcept TypeError:\n    pass\nelse:\n    assert False"]}, 1.0),
        (ADD, {"tests": ["x = [3, 1]\nx.sort()\nassert x == [1, 3]", "assert round(add(0.1, 0.2), 5) == 0.3"]}, 1.0),
        ("def order(items):\n    items.sort()", {"tests": ["x = [3, 1, 2]\norder(x)\nassert x == [1, 2, 3]"]}, 1.0),
        (
            STACK,
            {"tests": ["s = Stack()\ns.push(1)\ns.push((2, {3}))\nassert s.pop() == (2, {3})\nassert len(s) == 1"]},
            1.0,
        ),
        (STACK, {"tests": ["try:\n    Stack().pop()\n    raise ValueError\nexcept IndexError:\n    pass"]}, 1.0),
        (
            "def squares(n):\n    yield from (i * i for i in range(n))",
            {"tests": ["assert list(squares(3)) == [0, 1, 4]"]},
            1.0,
        ),
        (
            "import os\ndef f(x):\n    if x: os._exit(1)\n    return 1",
            {"tests": ["assert f(1)", "assert f(0) == 1"]},
            0.5,
        ),
    ],
)
async def test_asserts(stub: Any, program: str, fields: Any, expected: float) -> None:
    response = await stub.ScoreRollouts(group("code", program, args=ARGS, fields=fields))
    assert outcomes(response) == [pytest.approx(expected)], response.results[0]


@needs_sandbox
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "needs 1 to 200 tests"),
        ({"tests": [1]}, "another kind"),
        ({"tests": ["assert ("]}, "no Python"),
        ({"tests": ["assert add(lambda: 1, 2) == 3"]}, "cannot be handed to a solution"),
    ],
)
async def test_a_test_that_cannot_be_run_is_an_error_and_no_reward(stub: Any, fields: Any, says: str) -> None:
    response = await stub.ScoreRollouts(group("code", ADD, args=ARGS, fields=fields))
    assert outcomes(response) == ["INVALID_INPUT"]
    assert says in response.results[0].error.message


async def test_without_a_sandbox_it_refuses_unless_allowed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    async with reward_stub(Code(1)) as stub:
        with pytest.raises(FailedPreconditionError, match="allow_unsafe_code"):
            await stub.ScoreRollouts(group("code", ADD, fields={"tests": ["assert add(1, 2) == 3"]}))
    async with reward_stub(Code(1, allow_unsafe=True)) as stub:
        request = group("code", ADD, args=ARGS, fields={"tests": ["assert add(1, 2) == 3"]})
        assert outcomes(await stub.ScoreRollouts(request)) == [1.0]
        assert Sandbox.find(allow_unsafe=True).name == "none"
