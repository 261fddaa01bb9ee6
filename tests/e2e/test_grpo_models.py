"""Architectures other than Qwen3 in GRPO: what is pushed is, in vLLM, the policy that was trained, in float32.

The training worker and vLLM meet without the services between them, so that a case takes seconds: see
tests/helpers/models/pushed_models.py. SUROGATE_TEST_MODELS=all (`make test-models`) has every architecture; without it
those run that differ in how their weights are named, joined, packed or adapted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from surogate.v1 import weights_pb2
from tests.helpers.models.architectures import CONFIGS, EVERY

TOLERANCE = 5e-5
"""Of logprobs from -20 to 0 over tens of tokens: the random models of the tests are far from flat."""

MERGED = [
    "qwen3-moe-experts", "gpt-oss-experts", "gpt-oss-experts-saved", "mixtral-experts", "qwen3-moe-qexperts",
    "llama-embed", "qwen3-merged", "phi3-merged",
]  # fmt: skip
"""Adapters that are pushed merged into the weights that they are on."""
CHOSEN = [
    "llama-lora", "llama-head", "gemma2-lora", "gemma3-full", "phi3-lora", "glm4-lora", "olmo2-lora", "qwen3-moe-lora",
    "qwen3-moe-full", "gpt-oss-lora", "gpt-oss-full", "mixtral-full", "glm4-lora-saved", "qwen3-moe-full-saved",
    "llama-yarn", "llama-llama3", "gemma3-linear", *MERGED,
]  # fmt: skip
UNSERVED = "gemma3-vision"
"""vLLM needs torchvision for it, which its build for CPUs goes without."""
WAYS = ("lora", "lora-saved", "full", "full-saved")
ALL = [
    *(f"{name}-{way}" for name in CONFIGS if name != UNSERVED for way in WAYS),
    "llama-head",
    "llama-yarn",
    "llama-llama3",
    "gemma3-linear",
    *MERGED,
    "olmoe-experts",
]
CASES = ALL if EVERY else CHOSEN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the program found, by case."""
    folder = tmp_path_factory.mktemp("pushed")
    command = [sys.executable, "-m", "tests.helpers.models.pushed_models", str(folder), *CASES]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_what_is_pushed_is_the_policy(results: dict[str, dict[str, Any]], case: str) -> None:
    found = results[case]
    assert "error" not in found, found["error"]
    if case.endswith("-saved"):
        assert found["saved"] <= TOLERANCE
        return
    assert found["loaded"] <= TOLERANCE
    assert max(found["pushed"]) <= TOLERANCE
    assert max(found["kl"]) <= TOLERANCE**2, "rollouts after a push are the trainer's own"
    assert set(found["kinds"]) == {kind_of(case)}
    assert min(found["moved"]) > 100 * TOLERANCE, "a push that changes nothing would show"


def kind_of(case: str) -> int:
    """In what form the policy is pushed."""
    if case in MERGED or case.endswith("experts"):
        return weights_pb2.WEIGHT_KIND_DELTA
    return weights_pb2.WEIGHT_KIND_FULL if case.endswith("-full") else weights_pb2.WEIGHT_KIND_LORA
