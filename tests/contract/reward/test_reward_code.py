"""`code` over gRPC: programs that are right, partly right and wrong, in every form that tests have."""

import asyncio
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from reward_svc.environments.code import Code, program_of
from reward_svc.sandbox import launch
from reward_svc.sandbox.launch import Sandbox
from surogate.errors import FailedPreconditionError
from tests.contract.reward.test_reward_code_attacks import no_sandbox
from tests.helpers.reward.rewards import group, outcomes, reward_stub

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
            "import datetime\nfrom collections import namedtuple\nP = namedtuple('P', 'x y')\n"
            "def day(n): return datetime.date(2020, 1, n)\ndef p(): return P(1, [2])\ndef upto(n): return range(n)",
            {
                "tests": [
                    "import datetime\nassert day(3) - day(1) == datetime.timedelta(2)",
                    "assert p() == (1, [2]) and p().x == 1",
                    "assert upto(3) == range(3)",
                ]
            },
            1.0,
        ),
        (
            "class V:\n    def __init__(self, x): self.x = x\n    def __sub__(self, o): return V(self.x - o.x)\n"
            "    def __truediv__(self, n): return V(self.x / n)\n    def __str__(self): return f'<{self.x}>'",
            {"tests": ["v = (V(4) - V(1)) / 2\nassert v.x == 1.5 and str(v) == '<1.5>'"]},
            1.0,
        ),
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


HOLDING = """
import os, time
a = bytearray(b"x") * ({before} << 20)
children = []
for _ in range(4):
    child = os.fork()
    if not child:
        b = bytearray(b"x") * ({each} << 20)
        time.sleep({seconds})
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
print("DONE")
"""


def holding(before: int, each: int, seconds: int) -> str:
    """A program with five processes; MiB that they share, and MiB that each of four has for itself."""
    return HOLDING.format(before=before, each=each, seconds=seconds)


@needs_sandbox
async def test_memory_is_bounded_for_all_processes_of_a_program_together(stub: Any) -> None:
    args = {"timeout": 60, "memory_mb": 256}
    programs = (holding(0, 100, seconds=60), holding(100, 1, seconds=1))
    response = await stub.ScoreRollouts(
        group("code", *programs, args=args, fields={"tests": [{"input": "", "output": "DONE"}]}), timeout=120
    )
    assert outcomes(response) == [0.0, 1.0], "what processes share is counted once"
    assert "held more than 256 MiB, all of its processes together" in response.results[0].score.explanation


UNPRIVILEGED = """
import asyncio, json
from reward_svc.sandbox.launch import Limits, Sandbox
from reward_svc.sandbox.tests_of import asserts, prints

async def main():
    sandbox, limits = Sandbox.find(allow_unsafe={unsafe}), Limits(10, memory=256 << 20)
    verdicts = [await prints(sandbox, program, "", "DONE", limits) for program in {programs!r}]
    verdicts += await asserts(sandbox, "def f(x): return x + 1", ["assert f(1) == 2", "assert f(1) == 3"], limits)
    print(json.dumps([sandbox.name, [verdict.passed for verdict in verdicts]]))

asyncio.run(main())
"""


async def as_nobody(programs: list[str], *, unsafe: bool = False) -> list[Any]:
    """The sandbox that a service of the user nobody finds, and whether programs and two asserts pass in it."""
    python = shutil.which(f"python3.{sys.version_info.minor}", path="/usr/bin:/usr/local/bin")
    if os.geteuid() != 0 or python is None:
        pytest.skip(f"needs root to become nobody, and a Python 3.{sys.version_info.minor} that nobody may run")
    path = os.pathsep.join([str(Path(__file__).parents[3]), sysconfig.get_path("purelib")])
    process = await asyncio.create_subprocess_exec(
        python,
        *("-c", UNPRIVILEGED.format(programs=programs, unsafe=unsafe)),
        env={"PYTHONPATH": path, **({"PATH": "/nowhere"} if unsafe else {})},
        user=65534,
        group=65534,
        extra_groups=[],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    if b"Permission denied" in err or b"No module named" in err:
        pytest.skip(f"nobody may not read this folder or its packages: {err.decode().splitlines()[-1]}")
    assert out, err
    found: list[Any] = json.loads(out.splitlines()[-1])  # a warning of the log is before it
    return found


@needs_sandbox
async def test_it_works_for_a_service_that_is_not_root() -> None:
    programs = [
        "print('DONE')",
        holding(0, 100, seconds=60),
        "open('/etc/passwd')\nprint('DONE')",
        "import socket\nsocket.socket()\nprint('DONE')",
        "import os\nos.listdir('/root')\nprint('DONE')",
        "import os\nos.setuid(0)\nprint('DONE' if os.listdir('/proc/1/root/root') else '')",
        "import os, time\nfor i in range(11000): open(f'/tmp/{i}', 'x').close()\ntime.sleep(3)\nprint('DONE')",
    ]
    assert await as_nobody(programs) == ["bubblewrap", [True, False, False, False, False, False, False, True, False]]


async def test_without_a_sandbox_programs_do_not_reach_into_the_service() -> None:
    programs = [
        "print('DONE')",
        "import os\nopen(f'/proc/{os.getppid()}/environ').read()\nprint('DONE')",
        "import os\nopen(f'/proc/{os.getppid()}/mem', 'r+b')\nprint('DONE')",
        "import os\nos.listdir(f'/proc/{os.getppid()}/fd')\nprint('DONE')",
        "import socket\nsocket.socket()\nprint('DONE')",
    ]
    assert await as_nobody(programs, unsafe=True) == ["none", [True, False, False, False, False, True, False]]


async def test_without_a_sandbox_it_refuses_unless_allowed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    async with reward_stub(Code(1)) as stub:
        with pytest.raises(FailedPreconditionError, match="allow_unsafe_code"):
            await stub.ScoreRollouts(group("code", ADD, fields={"tests": ["assert add(1, 2) == 3"]}))
    async with reward_stub(Code(1, allow_unsafe=True)) as stub:
        request = group("code", ADD, args=ARGS, fields={"tests": ["assert add(1, 2) == 3"]})
        assert outcomes(await stub.ScoreRollouts(request)) == [1.0]
        assert Sandbox.find(allow_unsafe=True).name == "none"
        limited = group(
            "code",
            "while True: pass",
            "a = bytearray(b'x') * (1 << 30)\nprint('DONE')",
            "print('x' * (8 << 20))",
            "import os\nprint('DONE' if {'PATH', 'HOME', 'PYTHONPATH'} & os.environ.keys() else 'nothing')",
            args={"timeout": 1},
            fields={"tests": [{"input": "", "output": "DONE"}]},
        )
        assert outcomes(await stub.ScoreRollouts(limited, timeout=120)) == [0.0] * 4, "limits hold all the same"
