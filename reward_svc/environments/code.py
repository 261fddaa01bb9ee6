"""`code`: Python programs against tests, in a sandbox."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from reward_svc.sandbox.launch import MIB, Limits, Sandbox
from reward_svc.sandbox.tests_of import Verdict, asserts, prints
from surogate.errors import FailedPreconditionError, InvalidInputError
from surogate.reward.prompts import DatasetArgs, DatasetEnvironment
from surogate.structs import from_struct
from surogate.v1 import reward_pb2

MAX_CHARS = 100_000
MAX_TESTS = 200
_FENCE = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


class CodeArgs(DatasetArgs):
    """Arguments of `code`."""

    tests_field: str = "tests"
    """Column with the tests: a list of texts (Python with asserts) or of objects `{input, output}`."""
    setup_field: str = "setup"
    """Column with Python that goes before each assert test, if there is any."""
    entry_point_field: str = "entry_point"
    """Column with the name that a test which defines `check(candidate)` is about, if there is any."""
    partial: bool = True
    """Reward the share of tests passed; otherwise 1 if all pass, else 0."""
    timeout: float = Field(5.0, gt=0, le=300)
    """Seconds of processor time for one test; it fails after that, or after twice that and 5 s of wall time."""
    memory_mb: int = Field(256, ge=64, le=16_384)
    """Memory of the program, all its processes together, in MiB."""


class Code(DatasetEnvironment[CodeArgs]):
    """Rewards the share of tests that a program passes."""

    id = "code"
    description = "Write a Python program. Reward: share of its tests (asserts, or input and output) that pass."
    args_model = CodeArgs

    def __init__(self, processes: int, *, allow_unsafe: bool = False) -> None:
        self.max_concurrent = processes
        self._allow_unsafe = allow_unsafe
        self._sandbox: Sandbox | None = None
        self._problem = "no way to run programs was looked for"

    def open(self) -> None:
        """Looks for a way to run programs; without one every call is refused."""
        try:
            self._sandbox = Sandbox.find(allow_unsafe=self._allow_unsafe)
        except FailedPreconditionError as error:
            self._problem = error.message

    def parse(self, args: Mapping[str, Any]) -> CodeArgs:
        """Raises FailedPreconditionError where there is no way to run programs safely, and none else is allowed."""
        if self._sandbox is None:
            raise FailedPreconditionError(self._problem, reason="NO_SANDBOX")
        return super().parse(args)

    async def score(self, args: CodeArgs, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> reward_pb2.Score:
        """Runs the last fenced block of the completion, else all of it. Raises InvalidInputError for wrong tests."""
        fields = from_struct(example.fields)
        tests = _tests(fields.get(args.tests_field), args.tests_field)
        program = program_of(rollout.completion)
        if len(program) > MAX_CHARS:
            return reward_pb2.Score(reward=0.0, explanation=f"longer than {MAX_CHARS} characters")
        verdicts = await self._verdicts(args, program, tests, fields)
        share = sum(verdict.passed for verdict in verdicts) / len(verdicts)
        failed = next(((n, v.why) for n, v in enumerate(verdicts, start=1) if not v.passed), None)
        return reward_pb2.Score(
            reward=share if args.partial else float(share == 1.0),
            components={"passed": share, "all_passed": float(share == 1.0)},
            explanation="" if failed is None else f"test {failed[0]} of {len(verdicts)}: {failed[1]}",
        )

    async def _verdicts(
        self, args: CodeArgs, program: str, tests: Sequence[Any], fields: Mapping[str, Any]
    ) -> list[Verdict]:
        assert self._sandbox is not None
        limits = Limits(args.timeout, memory=args.memory_mb * MIB)
        if isinstance(tests[0], str):
            setup, name = fields.get(args.setup_field) or "", fields.get(args.entry_point_field)
            whole = [f"{setup}\n{test}{_check(test, name)}" for test in tests]
            return await asserts(self._sandbox, program, whole, limits)
        return [await prints(self._sandbox, program, test["input"], test["output"], limits) for test in tests]


def program_of(completion: str) -> str:
    """The last fenced block of a completion, else all of it."""
    fenced = _FENCE.findall(completion)
    return str(fenced[-1]) if fenced else completion


def _check(test: str, name: Any) -> str:
    return f"\ncheck({name})" if isinstance(name, str) and name.isidentifier() and "def check(" in test else ""


def _tests(tests: Any, column: str) -> Sequence[Any]:
    """The tests, checked. `{inputs: […], outputs: […]}` are several of input and output."""
    if isinstance(tests, str):
        tests = [tests]
    if isinstance(tests, Mapping) and {"inputs", "outputs"} <= set(tests):
        pairs = zip(tests["inputs"], tests["outputs"], strict=False)
        tests = [{"input": given, "output": expected} for given, expected in pairs]
    if not isinstance(tests, list) or not 1 <= len(tests) <= MAX_TESTS:
        raise InvalidInputError(f"code needs 1 to {MAX_TESTS} tests in the column {column!r}")
    if all(isinstance(test, str) for test in tests) or all(_is_pair(test) for test in tests):
        return tests
    raise InvalidInputError(f"the column {column!r} holds tests of another kind: texts, or objects {{input, output}}")


def _is_pair(test: Any) -> bool:
    return isinstance(test, dict) and all(isinstance(test.get(key), str) for key in ("input", "output"))
