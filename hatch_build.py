"""Build hook: generates the stubs from proto/ into surogate/v1/ and surogate/internal/v1/, for wheels and editable
installs alike."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent


def generate(root: Path = ROOT) -> None:
    """Writes `*_pb2.py`, `*_pb2_grpc.py` and their type stubs beside each other. Raises SystemExit if protoc refuses."""
    from grpc_tools import protoc

    protos = sorted((root / "proto" / "surogate").rglob("*.proto"))
    includes = [str(root / "proto"), sysconfig.get_path("purelib"), str(Path(protoc.__file__).parent / "_proto")]
    plugin = Path(sysconfig.get_path("scripts")) / "protoc-gen-mypy"
    plugin_path = {
        name: next(str(d / name) for d in (plugin.parent, *map(Path, _path_dirs())) if (d / name).exists())
        for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    }
    args = ["protoc", *(f"-I{path}" for path in includes)]
    args += [f"--plugin={name}={path}" for name, path in plugin_path.items()]
    args += [f"--{kind}_out={root}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main([*args, *map(str, protos)]) != 0:
        sys.exit("protoc refused the contract; see the messages above")
    for package in ("surogate/v1", "surogate/internal", "surogate/internal/v1"):
        (root / package / "__init__.py").write_text(f'"""Generated from proto/{package}; do not edit."""\n')


def _path_dirs() -> list[str]:
    import os

    return os.environ.get("PATH", "").split(os.pathsep)


class StubsHook(BuildHookInterface):
    """Hatchling's entry to `generate`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate(Path(self.root))


if __name__ == "__main__":
    generate()
