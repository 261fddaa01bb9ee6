"""Build hook: generates the stubs from proto/ into surogate/v1/ and surogate/internal/v1/, for wheels and editable
installs alike."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")


def generate(root: Path = ROOT) -> None:
    """Writes `*_pb2.py`, `*_pb2_grpc.py` and their type stubs. Raises SystemExit if protoc refuses."""
    from grpc_tools import protoc

    protos = sorted((root / "proto" / "surogate").rglob("*.proto"))
    includes = [root / "proto", _common_protos(), Path(protoc.__file__).parent / "_proto"]
    args = ["protoc", *(f"-I{path}" for path in includes)]
    args += [f"--plugin={name}={_plugin(name)}" for name in PLUGINS]
    args += [f"--{kind}_out={root}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main([*args, *map(str, protos)]) != 0:
        sys.exit("protoc refused the contract; see the messages above")
    for package in ("surogate/v1", "surogate/internal", "surogate/internal/v1"):
        (root / package / "__init__.py").write_text(f'"""Generated from proto/{package}; do not edit."""\n')


def _common_protos() -> Path:
    """The folder that holds google/rpc/status.proto: where googleapis-common-protos lies, which in an isolated build is
    not the environment's own site-packages."""
    spec = find_spec("google.rpc")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("googleapis-common-protos is not installed")
    return Path(spec.submodule_search_locations[0]).parents[1]


def _plugin(name: str) -> str:
    """Path of a protoc plugin: beside the interpreter, or on the path that an isolated build has."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    return found or sys.exit(f"{name} is not installed: it comes with mypy-protobuf")


class StubsHook(BuildHookInterface):
    """Hatchling's entry to `generate`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate(Path(self.root))


if __name__ == "__main__":
    generate()
