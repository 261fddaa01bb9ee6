"""Asking a judge: any endpoint that speaks OpenAI's chat completions, or an inference service of ours."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
from google.protobuf.json_format import ParseDict, ParseError

from surogate.errors import BusyError, DeadlineError, SurogateError, UnavailableError
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.v1 import common_pb2, inference_pb2, inference_pb2_grpc

MAX_BYTES = 4 << 20
"""Largest answer of an endpoint."""

_MAX_TOKENS = 10**9

MAX_PAUSE = 30.0
"""Longest pause before a request is made again, in seconds."""

_AGAIN = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
"""HTTP statuses after which the same request may succeed."""

Messages = Sequence[Mapping[str, str]]


class JudgeError(SurogateError):
    """The judge did not answer, or not so that it could be understood."""

    reason = "JUDGE_FAILED"


class _AgainError(Exception):
    """The request may be made again, after a pause if the endpoint says so."""

    def __init__(self, why: str, pause: float | None = None) -> None:
        super().__init__(why)
        self.pause = pause


@dataclass(frozen=True)
class Reply:
    """What a judge said, and what it cost."""

    text: str
    input_tokens: int = 0
    """Tokens of the question; 0 where the endpoint does not say."""
    output_tokens: int = 0


@dataclass(frozen=True)
class Endpoint:
    """Where judges are, and how they are asked."""

    urls: Sequence[str]
    """`http(s)://…/v1`, or `grpc(s)://HOST:PORT` of an inference service; where one fails the next is asked."""
    model: str | None
    key: str | None
    """Sent as a bearer token."""
    key_name: str
    """The environment variable that it comes from, for messages."""
    timeout: float
    """Seconds for a request and its repeats."""
    max_retries: int
    sampling: Mapping[str, Any] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    async def ask(self, messages: Messages, first: int = 0) -> Reply:
        """Asks the URL number `first`, and the others after it where that fails.

        Raises:
            JudgeError: None answered in time, or one refused the request.
        """
        problem = ""
        try:
            async with asyncio.timeout(self.timeout):
                for attempt in range(self.max_retries + 1):
                    try:
                        return await self._once(self.urls[(first + attempt) % len(self.urls)], messages)
                    except _AgainError as error:
                        problem, pause = str(error), error.pause
                    if attempt < self.max_retries:
                        await asyncio.sleep(_pause(attempt) if pause is None else min(pause, MAX_PAUSE))
        except TimeoutError as error:
            problem = f"; {problem}" if problem else ""
            raise JudgeError(f"the judge did not answer within {self.timeout:g} s{problem}") from error
        raise JudgeError(f"the judge failed {self.max_retries + 1} times; the last time: {problem}")

    async def _once(self, url: str, messages: Messages) -> Reply:
        scheme, _, rest = url.partition("://")
        if scheme in ("grpc", "grpcs"):
            return await self._inference(rest.rstrip("/"), messages, tls=scheme == "grpcs")
        return await self._openai(url.rstrip("/"), messages)

    async def _openai(self, url: str, messages: Messages) -> Reply:
        body = {"model": self.model, "messages": list(messages), **self.sampling, **self.extra_body}
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            async with (
                httpx2.AsyncClient(timeout=self.timeout, headers=headers) as client,
                client.stream("POST", f"{url}/chat/completions", json=body) as response,
            ):
                content = await _read(response)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _AgainError(f"{url}: {type(error).__name__} {error}".rstrip()) from error
        self._check(url, response, content)
        return _completion(url, content)

    def _check(self, url: str, response: httpx2.Response, content: bytes) -> None:
        if response.is_success:
            return
        why = f"{url} answered {response.status_code}: {content[:300].decode('utf-8', 'replace')}"
        if response.status_code in _AGAIN:
            raise _AgainError(why, _retry_after(response))
        if response.status_code in (401, 403):
            why += f" (the key is the environment variable {self.key_name} of the reward service)"
        raise JudgeError(why)

    async def _inference(self, address: str, messages: Messages, *, tls: bool) -> Reply:
        request = inference_pb2.StreamGenerateRequest(sampling=sampling_params({**self.sampling, **self.extra_body}))
        for message in messages:
            request.conversation.messages.add(role=message["role"], content=message["content"])
        pieces, size, given, made = [], 0, 0, 0
        try:
            async with open_channel(address, ClientSecurity(tls=tls, token=self.key)) as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                async for piece in stub.StreamGenerate(request, timeout=self.timeout):
                    pieces.append(piece.text)
                    size += len(piece.text)
                    if size > MAX_BYTES:
                        raise _too_long()
                    given += piece.prompt_tokens
                    made += len(piece.token_ids)
        except BusyError as error:
            raise _AgainError(f"{address}: {error}", error.retry_after) from error
        except UnavailableError as error:
            raise _AgainError(f"{address}: {error}") from error
        except DeadlineError as error:
            raise JudgeError(f"{address} did not answer within {self.timeout:g} s") from error
        except SurogateError as error:
            raise JudgeError(f"{address}: {error}") from error
        return Reply("".join(pieces), given, made)


def sampling_params(values: Mapping[str, Any]) -> common_pb2.SamplingParams:
    """Sampling of an inference service of ours. Raises ValueError for a setting that it does not have."""
    try:
        return ParseDict(dict(values), common_pb2.SamplingParams())
    except ParseError as error:
        raise ValueError(f"an inference service takes no such sampling: {error}") from error


async def _read(response: httpx2.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > MAX_BYTES:
            raise _too_long()
    return bytes(content)


def _too_long() -> JudgeError:
    return JudgeError(f"the judge answered more than {MAX_BYTES >> 20} MiB")


def _completion(url: str, content: bytes) -> Reply:
    try:
        answer = json.loads(content)
        text = answer["choices"][0]["message"]["content"] or ""
        usage = answer.get("usage") or {}
        return Reply(str(text), _tokens(usage.get("prompt_tokens")), _tokens(usage.get("completion_tokens")))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise JudgeError(f"{url} answered something other than a chat completion: {content[:200]!r}") from error


def _tokens(said: Any) -> int:
    """A number of tokens; 0 for what can be none."""
    return said if type(said) is int and 0 <= said <= _MAX_TOKENS else 0


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the endpoint asks for; None if it does not, or names a date."""
    try:
        return max(0.0, float(response.headers.get("retry-after", "")))
    except ValueError:
        return None


def _pause(attempt: int) -> float:
    pause: float = min(0.5 * 2**attempt, MAX_PAUSE) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
    return pause
