"""The services of examples/custom_reward as processes; what needs a tool that is missing is skipped with the reason."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from surogate.process import Announcement

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "custom_reward"
_NO_NETWORK = ("ENOTFOUND", "ECONNREFUSED", "ETIMEDOUT", "EAI_AGAIN", "ENETUNREACH", "dial tcp", "ENOTCACHED")


@contextmanager
def sdk() -> Iterator[str]:
    """python/server.py; yields its address."""
    with tempfile.TemporaryDirectory() as folder:
        announced = Path(folder) / "announced.json"
        arguments = ["--listen", "127.0.0.1:0", "--announce-file", str(announced)]
        with _ending([sys.executable, str(EXAMPLES / "python" / "server.py"), *arguments]) as process:
            while (found := Announcement.read(announced)) is None:
                assert process.poll() is None
                time.sleep(0.05)
            yield found.address


@contextmanager
def stubs_only() -> Iterator[str]:
    """python/stubs_only.py; yields its address."""
    with _listening([sys.executable, str(EXAMPLES / "python" / "stubs_only.py"), "127.0.0.1:0"]) as address:
        yield address


def build_typescript(folder: Path) -> Path:
    """Installs and builds typescript/ in a folder; returns the program."""
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("node and npm are not installed")
    major = int(_run(["node", "--version"], folder).removeprefix("v").partition(".")[0])
    if major < 20:
        pytest.skip(f"node {major} is older than 20")
    shutil.copytree(
        EXAMPLES / "typescript", folder, ignore=shutil.ignore_patterns("node_modules", "dist"), dirs_exist_ok=True
    )
    _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder)
    _run(["npm", "run", "build"], folder)
    return folder / "dist" / "server.js"


@contextmanager
def typescript(program: Path, **environment: str) -> Iterator[str]:
    """typescript/, built; yields its address."""
    extra = {"PROTO_ROOT": str(ROOT / "proto"), **environment}
    with _listening(["node", str(program), "127.0.0.1:0"], extra) as address:
        yield address


@contextmanager
def go() -> Iterator[str]:
    """go/, built in a folder of its own; yields its address."""
    needed = ["go", "protoc-gen-go", "protoc-gen-go-grpc"]
    missing = [name for name in needed if not shutil.which(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "vowels"
        version = re.search(r"go1\.(\d+)", _run(["go", "version"], Path(name)))
        if version is None or int(version[1]) < 25:
            pytest.skip("go is older than 1.25")
        shutil.copytree(EXAMPLES / "go", folder)
        import google.rpc  # where google/rpc/status.proto lies

        (apis, *_) = google.rpc.__path__
        paths = {"PROTO_ROOT": str(ROOT / "proto"), "GOOGLEAPIS": str(Path(apis).parents[1])}
        _run(["./generate.sh"], folder, {**paths, "PROTOC": f"{sys.executable} -m grpc_tools.protoc"})
        _run(["go", "mod", "tidy"], folder)
        _run(["go", "build", "-o", "vowels", "."], folder)
        with _listening([str(folder / "vowels"), "127.0.0.1:0"]) as address:
            yield address


def _run(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """Its output; skips where it wants a registry that cannot be reached."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    said = done.stdout + done.stderr
    if done.returncode and any(word in said for word in _NO_NETWORK):
        pytest.skip(f"`{' '.join(command)}` reaches no registry: {said.strip().splitlines()[-1]}")
    assert done.returncode == 0, said
    return done.stdout


@contextmanager
def _listening(command: list[str], environment: Mapping[str, str] | None = None) -> Iterator[str]:
    with _ending(command, environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on port "), line
        yield f"127.0.0.1:{line.split()[-1]}"


@contextmanager
def _ending(command: list[str], environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that ends by SIGTERM, as a container does."""
    inherited = {"PYTHONPATH": str(ROOT), **os.environ, **(environment or {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=inherited) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
