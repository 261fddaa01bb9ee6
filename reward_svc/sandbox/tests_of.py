"""Runs a program against its tests. The verdict is made where the program is not."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from reward_svc.sandbox.launch import MAX_FILES, MIB, Limits, Program, Role, Sandbox
from surogate.errors import InternalError, InvalidInputError

START_SECONDS = 20.0
"""Time that a sandbox may take to start, beyond the time of the program, on a busy machine."""


MAX_ROUNDS = 4
"""Tests in which a program may end or hang before the rest is given up."""


@dataclass(frozen=True)
class Verdict:
    """How one test went."""

    passed: bool
    why: str = ""


async def prints(sandbox: Sandbox, program: str, stdin: str, expected: str, limits: Limits) -> Verdict:
    """Whether the program, given `stdin`, prints `expected` (white space at ends of lines and of the output aside).

    The comparison is made here: the program never sees what is expected.
    """
    running = await sandbox.start(Role.SCRIPT, {"program": program}, limits, stdin=stdin.encode("utf-8", "replace"))
    output = b""
    try:
        async with asyncio.timeout(limits.wall):
            while piece := await running.stdout.read(1 << 16):
                output += piece
                if len(output) > limits.output_bytes:
                    return Verdict(False, f"printed more than {limits.output_bytes} bytes")
            code = await running.wait()
    except TimeoutError:
        return Verdict(False, f"took longer than {limits.seconds:g} s")
    finally:
        await running.stop()
    if running.too_large:
        return Verdict(False, _too_large(limits))
    if code != 0:
        return Verdict(False, f"ended with exit code {code}")
    same = _lines(output.decode("utf-8", "replace")) == _lines(expected)
    return Verdict(same, "" if same else "printed something else")


def _too_large(limits: Limits) -> str:
    return f"held more than {limits.memory // MIB} MiB, all of its processes together, or {MAX_FILES} files"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


async def asserts(sandbox: Sandbox, program: str, tests: Sequence[str], limits: Limits) -> list[Verdict]:
    """Which of the tests, pieces of Python that raise or not, pass with the program's names.

    They run in a sandbox of their own. When the program ends or hangs in a test, the rest is tried with a new one.
    Raises InvalidInputError for a test that cannot be run against a program that is elsewhere.
    """
    verdicts: list[Verdict] = []
    for _ in range(MAX_ROUNDS):
        verdicts += await _round(sandbox, program, tests[len(verdicts) :], limits)
        if len(verdicts) == len(tests):
            return verdicts
    left = len(tests) - len(verdicts)
    return verdicts + [Verdict(False, f"not tried: the program ended or hung in {MAX_ROUNDS} tests before")] * left


async def _round(sandbox: Sandbox, program: str, tests: Sequence[str], limits: Limits) -> list[Verdict]:
    """Verdicts of the first tests, at least one, up to the one in which the program ended or hung."""
    ours, theirs = socket.socketpair()
    started: list[Program] = []
    try:
        whole = Limits(limits.seconds * len(tests), limits.memory, limits.processes, limits.file_bytes)
        with ours, theirs:
            for role, payload, end in (
                (Role.SOLUTION, {"program": program}, theirs),
                (Role.TESTS, {"tests": list(tests)}, ours),
            ):
                os.set_inheritable(end.fileno(), True)
                started.append(
                    await sandbox.start(role, payload, whole, channel=end.fileno(), output=role is Role.TESTS)
                )
        verdicts = await _verdicts(started[1], len(tests), limits)
        if started[0].too_large and not verdicts[-1].passed:
            verdicts[-1] = Verdict(False, _too_large(limits))
        return verdicts
    finally:
        for running in started:
            await running.stop()


async def _verdicts(running: Program, count: int, limits: Limits) -> list[Verdict]:
    verdicts: list[Verdict] = []
    begun = False
    while len(verdicts) < count:
        try:
            async with asyncio.timeout(limits.wall + START_SECONDS * (not verdicts and not begun)):
                line = await running.stdout.readline()
        except TimeoutError:
            late = Verdict(False, f"took longer than {limits.seconds:g} s")
            return [*verdicts, late] if begun else [late] * count
        if not line:
            raise InternalError(f"the tests ended with exit code {await running.wait()}")
        message = json.loads(line)
        if "failed" in message:
            return [Verdict(False, message["failed"])] * count
        if "begin" in message:
            begun = True
            continue
        if "unsupported" in message:
            raise InvalidInputError(f"a test cannot be run: {message['unsupported']}")
        begun = False
        verdicts.append(Verdict(message["ok"], message.get("why", "")))
        if message.get("gone"):
            break
    return verdicts
