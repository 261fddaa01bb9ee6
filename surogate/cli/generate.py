"""`surogate generate`: talk to the served model."""

from __future__ import annotations

import sys

from surogate.cli.console import write_foreign
from surogate.cli.exits import OK, reaching
from surogate.client import Client
from surogate.client.generate import Prompt
from surogate.v1 import common_pb2

START_INFERENCE = "surogate serve inference --listen HOST:PORT --config infer.yaml"


def generate(
    server: str, prompt: str | None, sampling: common_pb2.SamplingParams, *, system: str | None, raw: bool
) -> int:
    """Answers one prompt, or holds a conversation on the terminal until its end."""
    with Client(server) as client, reaching("inference service", server, START_INFERENCE):
        if prompt is None and sys.stdin.isatty():
            return _converse(client, sampling, system=system, raw=raw)
        text = prompt if prompt is not None else sys.stdin.read()
        _answer(client, text if raw else [*_opening(system), _turn("user", text)], sampling)
    return OK


def _converse(client: Client, sampling: common_pb2.SamplingParams, *, system: str | None, raw: bool) -> int:
    served = client.served_model()
    adapter = f" with adapter {served.adapter}" if served.adapter else ""
    sys.stderr.write(
        f"{served.model}{adapter}, policy version {served.policy_version}. Ctrl-D ends, an empty line starts anew.\n"
    )
    turns = _opening(system)
    while True:
        try:
            text = input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return OK
        if not text:
            turns = _opening(system)
            continue
        turns.append(_turn("user", text))
        turns.append(_turn("assistant", _answer(client, text if raw else turns, sampling)))


def _answer(client: Client, prompt: Prompt, sampling: common_pb2.SamplingParams) -> str:
    """Writes the answer as it is made; returns it."""
    pieces: list[str] = []
    reason = common_pb2.FINISH_REASON_UNSPECIFIED
    for piece in client.stream(prompt, sampling):
        write_foreign(piece.text)
        pieces.append(piece.text)
        reason = piece.finish_reason
    sys.stdout.write("\n")
    if reason == common_pb2.FINISH_REASON_LENGTH:
        sys.stderr.write("(cut off at max_tokens or at the end of the context)\n")
    return "".join(pieces)


def _opening(system: str | None) -> list[dict[str, str]]:
    return [_turn("system", system)] if system else []


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
