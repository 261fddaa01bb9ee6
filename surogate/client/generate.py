"""What people call a prompt, as a request of the contract."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from surogate.errors import InvalidInputError
from surogate.v1 import common_pb2, inference_pb2

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
"""Text, messages with `role` and `content`, or token ids."""


def generate_request(
    prompt: Prompt, sampling: common_pb2.SamplingParams | None = None
) -> inference_pb2.StreamGenerateRequest:
    """Builds the request. Raises InvalidInputError for an empty prompt or a message without role or content."""
    request = inference_pb2.StreamGenerateRequest(sampling=sampling, request_id=uuid.uuid4().hex)
    if not prompt:
        raise InvalidInputError("the prompt is empty")
    if isinstance(prompt, str):
        request.text = prompt
        return request
    for item in prompt:
        if isinstance(item, int):
            request.tokens.ids.append(item)
        else:
            request.conversation.messages.append(_message(item))
    return request


def _message(item: Mapping[str, str]) -> common_pb2.ChatMessage:
    if not item.get("role") or item.get("content") is None:
        raise InvalidInputError(f"a message needs role and content: {dict(item)!r}")
    return common_pb2.ChatMessage(role=item["role"], content=item["content"])
