"""`surogate env`: what init writes works after pip install -e, list knows it, eval says what a model earns."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from surogate.rpc.server import RpcServer
from surogate.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.helpers.rpc import serving

ROOT = Path(__file__).parents[3]


async def surogate(*arguments: object, python: Path = Path(sys.executable)) -> tuple[int, str, str]:
    """Runs `surogate ARGUMENTS`; returns exit code, output and errors."""
    process = await asyncio.create_subprocess_exec(
        python,
        *("-m", "surogate.cli.main", *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def run(*arguments: object, python: Path = Path(sys.executable)) -> tuple[int, str, str]:
    """The same, where nothing else goes on."""
    return asyncio.run(surogate(*arguments, python=python))


def test_what_init_writes_works_after_pip_install(tmp_path: Path) -> None:
    code, out, err = run("env", "init", "my-env", "--directory", tmp_path)
    assert code == 0 and "pip install -e" in out, err
    python = virtual_environment(tmp_path / "venv")
    project = tmp_path / "my-env"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-e", str(project)], check=True, timeout=240)
    tests = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=project, capture_output=True, text=True
    )
    assert tests.returncode == 0 and "6 passed" in tests.stdout, tests.stdout
    code, out, err = run("env", "list", "--json", python=python)
    assert code == 0, err
    listed = {line["id"]: line for line in map(json.loads, out.splitlines())}
    assert {"math", "code", "reverse-text", "my-env"} <= listed.keys()
    assert listed["my-env"]["description"] == "Ends with the right number: 1; has it somewhere: a half."
    assert listed["my-env"]["has_examples"]


def virtual_environment(folder: Path) -> Path:
    """A virtual environment that sees what this one has; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=240)
    (site,) = folder.glob("lib/python*/site-packages")
    # As a folder of packages, so that what is installed there for editing is seen too.
    (site / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return folder / "bin" / "python"


@pytest.mark.parametrize("name", ["My-Env", "my_env", "-env", "json", "class", "../env", ""])
def test_a_name_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    code, _, err = run("env", "init", "--directory", tmp_path, "--", name)
    assert code == 2 and "NAME" in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "my-env").mkdir()
    (tmp_path / "my-env" / "work.txt").write_text("mine")
    code, _, err = run("env", "init", "my-env", "--directory", tmp_path)
    assert code == 2 and "not empty" in err
    assert [path.name for path in (tmp_path / "my-env").iterdir()] == ["work.txt"]


class Model(inference_pb2_grpc.InferenceServiceServicer):
    """Says the text of the prompt, backwards for even seeds."""

    async def GetServedModel(self, request: Any, context: Any) -> inference_pb2.ServedModel:
        return inference_pb2.ServedModel(model="parrot")

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        text = request.conversation.messages[-1].content
        for char in text if request.sampling.seed % 2 else text[::-1]:
            yield inference_pb2.StreamGenerateResponse(text=char, token_ids=[1])
        yield inference_pb2.StreamGenerateResponse(finish_reason=common_pb2.FINISH_REASON_STOP)


@asynccontextmanager
async def served_model() -> AsyncIterator[str]:
    """The address of a parrot."""

    def register(server: RpcServer) -> None:
        add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
        server.add(add, Model(), "surogate.v1.InferenceService")

    async with serving(register) as server:
        yield server.address


async def test_eval_says_what_a_model_earns() -> None:
    async with served_model() as address:
        arguments = ("env", "eval", "reverse-text", "--inference", address, "-n", "6", "--rollouts", "4")
        code, out, err = await surogate(*arguments, "--json")
        assert code == 0, err
        found = json.loads(out)
        assert (found["examples"], found["rollouts"], found["scored"], found["failed"]) == (6, 24, 24, 0)
        assert found["max"] == 1 and found["min"] < 1 and found["signal"] > 0.5
        assert 0.5 <= found["components"]["exact"] <= found["mean"] < 1
        assert sum(found["histogram"]["counts"]) == 24 and len(found["samples"]) == 5
        assert [sample["reward"] for sample in found["samples"]] == sorted(s["reward"] for s in found["samples"])
        assert found["truncated"] == 0 and found["mean_tokens"] > 1
        code, out, _ = await surogate(*arguments)
        assert code == 0 and "24 scored, 0 errors" in out and "█" in out


async def test_eval_counts_errors_and_fails_where_nothing_is_scored(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "a"}\n{"prompt": "b", "answer": "b"}\n')
    async with served_model() as address:
        arguments = ("env", "eval", "json-schema", "--inference", address, "--set", f"dataset={tmp_path}/rows.jsonl")
        code, out, err = await surogate(*arguments, "--split", "train", "--json")
    found = json.loads(out)
    assert code == 1, err
    assert found["scored"] == 0 and found["failed"] == 4 == sum(found["errors"].values())
    assert any("schema" in error for error in found["errors"])


async def test_eval_plays_episodes() -> None:
    async with served_model() as address:
        arguments = ("env", "eval", "guess-number", "--inference", address, "-n", "2", "--rollouts", "2")
        code, out, err = await surogate(*arguments, "--max-turns", "3", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["rollouts"], found["scored"]) == (4, 4)
    assert found["mean_tokens"] > 100  # of several turns: a prompt has some 60 characters, said again turn by turn


async def test_eval_says_what_is_not_there() -> None:
    code, _, err = await surogate("env", "eval", "reverse-text", "--inference", "127.0.0.1:1")
    assert code == 1 and "cannot reach the inference service" in err and "Traceback" not in err
    assert "cannot reach the reward service" not in err
    async with served_model() as address:
        code, _, err = await surogate("env", "eval", "no-such", "--inference", address)
    assert code == 2 and "no-such" in err
