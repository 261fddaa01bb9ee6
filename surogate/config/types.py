"""Types of values that several files use: dtypes, RoPE scaling, addresses."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from surogate.config.base import fail, shown, spelled

DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
"""Other spellings of dtypes."""

Dtype = Annotated[Literal["auto", "bfloat16", "float16", "float32"], spelled(DTYPES)]
ROPE_METHODS = ("linear", "dynamic", "yarn", "longrope", "llama3")


def parse_rope_scaling(value: Any) -> Any:
    """A name or an object, which may be JSON text. Raises what pydantic takes for a wrong value."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise fail(f"is not a JSON object: {error}") from error
    if isinstance(value, dict) and not ({"rope_type", "type"} & set(value)):
        raise fail("must have `rope_type`")
    if isinstance(value, str) and value not in ROPE_METHODS:
        raise fail(f"must be one of {', '.join(ROPE_METHODS)}, or a JSON object; got {shown(value)}")
    if value is not None and not isinstance(value, dict | str):
        raise fail(f"must be a name or a JSON object, got {shown(value)}")
    return value


RopeScaling = Annotated[str | dict[str, Any] | None, BeforeValidator(parse_rope_scaling)]

URL = re.compile(r"^(?:http|grpc)://([^/]+)(?:/.*)?$")
ADDRESS = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})$")


def _address(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = URL.sub(r"\1", value)
    match = ADDRESS.match(value)
    if not value.startswith("unix:") and not (match and 0 < int(match[2]) < 65536):
        raise fail(f"must be a gRPC address `host:port`, got {shown(value)}")
    return value


API_KEY_VARIABLE = r"^[A-Z][A-Z0-9_]*_API_KEY$"
"""Names of environment variables that a job may have sent to a judge: others hold what is not for judges."""
JUDGE_URL = re.compile(r"^(?:https?://[^\s/?#@]+(?:/[^\s?#]*)?|grpcs?://[^\s/?#@]+:[0-9]{1,5}/?)$")


def _judge_url(value: Any) -> Any:
    if isinstance(value, str) and not JUDGE_URL.match(value):
        raise fail(f"must be http(s)://HOST/PATH, or grpc(s)://HOST:PORT of an inference service, got {shown(value)}")
    return value


JudgeUrl = Annotated[str, BeforeValidator(_judge_url)]
"""`https://HOST/v1`, or `grpc://HOST:PORT`."""

Address = Annotated[str, BeforeValidator(_address)]
"""`host:port`, `[::1]:port` or `unix:PATH`; of a URL `http://host:port/…` only host and port are kept."""
