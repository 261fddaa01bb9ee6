"""Compiles the modules below a folder that have no bytecode yet: `compile.py FOLDER`.

Bytecode that is checked by nobody's clock: the same on each build, and never written again. What a layer below has
compiled stays its own.
"""

from __future__ import annotations

import compileall
import importlib.util
import py_compile
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def compile_one(path: str) -> None:
    """Compiles a module. Some packages carry templates that are no Python: they stay as they are."""
    compileall.compile_file(path, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


def main(folder: str) -> None:
    """Compiles on all cores."""
    modules = map(str, sorted(Path(folder).rglob("*.py")))
    missing = [path for path in modules if not Path(importlib.util.cache_from_source(path)).exists()]
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(compile_one, missing, chunksize=64):
            pass


if __name__ == "__main__":
    main(sys.argv[1])
