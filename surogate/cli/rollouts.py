"""`surogate rollouts`: look at, export and score again what a GRPO job stored."""

from __future__ import annotations

import csv
import heapq
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from surogate.cli.exits import OK, usage
from surogate.errors import NotFoundError
from surogate.rollouts import SCHEMA, TEXT_COLUMNS, num_sampled, read_steps, write_table
from surogate.visible import visible

Row = dict[str, Any]
_WIDTH = 48
_ID_WIDTH = 14
"""An id is shown whole, however narrow the terminal is: `show` wants it."""


@dataclass(frozen=True)
class Selection:
    """Which rollouts."""

    first: int = 0
    last: int | None = None
    environment: str | None = None
    fate: str | None = None

    def rows(self, output_dir: Path, columns: list[str] | None = None) -> Iterator[Row]:
        """The rollouts of a job that are meant, by step."""
        for _, rows in read_steps(output_dir, first=self.first, last=self.last, columns=columns):
            yield from (row for row in rows if self._means(row))

    def _means(self, row: Row) -> bool:
        return self.environment in (None, row["environment"]) and self.fate in (None, row["fate"])


def list_rollouts(output_dir: Path, chosen: Selection, *, sort: str, limit: int, as_json: bool) -> int:
    """Prints one line for each rollout: the newest, or those with the lowest or highest rewards."""
    rows = chosen.rows(output_dir, TEXT_COLUMNS)
    if sort == "newest":
        found = heapq.nlargest(limit, rows, key=itemgetter("step", "rollout_id"))
    elif sort == "best":
        found = heapq.nlargest(limit, rows, key=itemgetter("reward"))
    else:
        found = heapq.nsmallest(limit, rows, key=itemgetter("reward"))
    if as_json:
        _write_json(found)
        return OK
    table = Table(
        "step",
        Column("rollout", min_width=_ID_WIDTH),
        "environment",
        "reward",
        "fate",
        "prompt",
        "completion",
    )
    for row in found:
        cells = (
            str(row["step"]),
            row["rollout_id"],
            row["environment"],
            f"{row['reward']:.3f}",
            row["fate"],
            _short(_last_message(row)),
            _short(row["completion"]),
        )
        table.add_row(*map(_text, cells))
    Console().print(table)
    return OK


def show_rollout(output_dir: Path, rollout_id: str, *, as_json: bool) -> int:
    """Prints one rollout whole. Raises NotFoundError."""
    row = next((row for row in Selection().rows(output_dir) if row["rollout_id"] == rollout_id), None)
    if row is None:
        raise NotFoundError(f"{output_dir} has no rollout {rollout_id}; `surogate rollouts list` shows their ids")
    if as_json:
        _write_json([row])
        return OK
    console = Console(highlight=False, soft_wrap=True)
    for message in json.loads(row["prompt"]):
        _print_message(console, message)
    turns = json.loads(row["messages"] or "[]")
    many = f" in {row['turns']} turns" if turns else ""
    console.print(f"[bold]completion[/bold]  ({num_sampled(row)} tokens{many}, {row['finish_reason']})")
    for message in turns:
        _print_message(console, message)
    if not turns:
        console.print(_text(row["completion"]))
    facts = Table.grid(padding=(0, 2))
    for name in ("answer", "reward", *row["components"], "fate", "step", "oldest_version", "newest_version"):
        facts.add_row(_text(name), _text(str(row["components"].get(name, row.get(name)))))
    facts.add_row("scored by", _text(row["scored_by"]))
    console.print(facts)
    return OK


def _print_message(console: Console, message: dict[str, Any]) -> None:
    console.print(_text(message.get("role", ""), style="bold"))
    console.print(_text(message.get("content", "")))


def _text(text: str, style: str = "") -> Text:
    """What a model or a service wrote: never markup, and nothing that a terminal obeys."""
    return Text(visible(text), style=style)


def export_rollouts(output_dir: Path, target: Path, chosen: Selection) -> int:
    """Writes rollouts into one .jsonl, .csv or .parquet file; an existing one is replaced when all is written."""
    writer = _WRITERS.get(target.suffix)
    if writer is None:
        raise usage("FILE", f"must end in {', '.join(_WRITERS)}, got {target.name}")
    part = target.with_name(f".{target.stem}.part{target.suffix}")
    count = writer(part, chosen.rows(output_dir))
    part.replace(target)
    sys.stdout.write(f"{count} rollouts in {target}\n")
    return OK


def _write_jsonl_file(path: Path, rows: Iterable[Row]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(f"{_as_json(row)}\n")
            count += 1
    return count


def _write_csv_file(path: Path, rows: Iterable[Row]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, TEXT_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "components": json.dumps(row["components"])})
            count += 1
    return count


def _write_parquet_file(path: Path, rows: Iterable[Row]) -> int:
    found = list(rows)
    write_table(path, found, SCHEMA)
    return len(found)


_WRITERS = {".jsonl": _write_jsonl_file, ".csv": _write_csv_file, ".parquet": _write_parquet_file}


def _write_json(rows: Iterable[Row]) -> None:
    for row in rows:
        sys.stdout.write(f"{_as_json(row)}\n")


def _as_json(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)


def _last_message(row: Row) -> str:
    messages = json.loads(row["prompt"])
    return str(messages[-1].get("content", "")) if messages else ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"
