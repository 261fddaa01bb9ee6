"""The page with the figures: each benchmark's table stands between two markers, under what it was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from tests.bench.table import Table


def conditions(command: str) -> str:
    """The machine, the day, the code and the command."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({_processor()}), {memory:.0f} GiB, "
        f"Python {platform.python_version()}, {_commit()}, `{command}`"
    )


def update(page: Path, name: str, table: Table, said: str) -> None:
    """Puts a table in place of the one that the page has. Raises ValueError when the page has no place for it."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page} has no {begin} … {end}")
    lines = [begin, f"{said}:", "", *table.lines(), end]
    page.write_text(before + "\n".join(lines) + after, encoding="utf-8")


def _commit() -> str:
    """The code that is measured."""
    told = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return f"commit {told.stdout.strip()}" if told.returncode == 0 else "no git checkout"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
