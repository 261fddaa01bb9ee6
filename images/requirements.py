"""Prints what the package needs, a requirement a line, so that a layer of them outlives changes of the code.

`requirements.py pyproject.toml TARGET VARIANT` prints what an image needs; with `build` for a target what building the
wheel needs, with `constraints` the versions to install.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXTRAS = {
    "orchestrator": ("kubernetes", "otel", "postgres", "s3", "tracking"),
    "reward": ("otel", "s3"),
    "trainer": ("otel", "s3", "trainer"),
    "inference": ("otel", "s3"),
}
"""Extras of the package in each image; the replica has `cpu` or `gpu` beside them."""

WITHOUT_DEPENDENCIES = {"xgrammar": ("apache-tvm-ffi",)}
"""What a CPU build installs without its dependencies, after the rest, and those of them that nothing else brings.
Left out is Triton."""


def of_extra(project: dict[str, Any], extra: str) -> Iterator[str]:
    """Requirements of an extra; one that names other extras of the package stands for theirs."""
    optional = project["optional-dependencies"]
    if extra not in optional:
        sys.exit(f"pyproject.toml has no extra {extra!r}; it has {', '.join(sorted(optional))}")
    for requirement in optional[extra]:
        own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
        if own is None:
            yield requirement
            continue
        for name in own[1].split(","):
            yield from of_extra(project, name.strip())


def constraints(folder: Path, variant: str) -> list[str]:
    """constraints.txt; for GPUs with what images/constraints-gpu.txt adds to it and has instead."""
    pinned = [*_pinned(folder / "constraints.txt")]
    if variant != "gpu":
        return pinned
    more = [*_pinned(Path(__file__).with_name("constraints-gpu.txt"))]
    others = {_name(line) for line in more}
    return [line for line in pinned if _name(line) not in others] + more


def _pinned(file: Path) -> Iterator[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return (line for line in lines if line and not line.startswith("#"))


def _name(line: str) -> str:
    """What a requirement names, normalised."""
    found = re.match(r"[A-Za-z0-9._-]+", line)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def main(path: str, wanted: str, variant: str) -> None:
    """Prints them to standard output."""
    document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    if wanted == "constraints":
        found = constraints(Path(path).parent, variant)
    elif wanted == "build":
        found = document["build-system"]["requires"]
    else:
        project = document["project"]
        extras = [*EXTRAS[wanted], *([variant] if wanted == "inference" else [])]
        found = [*project["dependencies"], *(line for extra in extras for line in of_extra(project, extra))]
        if variant == "cpu":
            found = [one for line in found for one in WITHOUT_DEPENDENCIES.get(_name(line), (line,))]
    sys.stdout.write("\n".join(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
