"""The rollout store of a GRPO job: every rollout that was scored, as Parquet, one file a step.

`OUTPUT_DIR/rollouts/step-N.parquet` is written whole or not at all and never changed afterwards, so that an interrupted
write loses no earlier row. Any tool that reads Parquet reads the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from surogate.errors import DataLossError, NotFoundError

FOLDER = "rollouts"
_NAME = re.compile(r"step-(\d+)\.parquet")

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("rollout_id", pa.string()),
        ("group_id", pa.string()),
        ("environment", pa.string()),
        ("example_id", pa.string()),
        ("prompt", pa.string()),  # JSON: a list of messages
        ("answer", pa.string()),
        ("fields", pa.string()),  # JSON: further fields of the example
        ("completion", pa.string()),  # of an episode: the model's last turn
        ("turns", pa.int32()),  # of the model
        ("messages", pa.string()),  # JSON: what was said after the prompt, of an episode; else an empty list
        ("state", pa.string()),  # JSON: what the environment remembered of the episode
        ("reward", pa.float64()),
        ("components", pa.map_(pa.string(), pa.float64())),
        ("fate", pa.string()),  # trained, or why not: zero_signal, surplus
        ("finish_reason", pa.string()),  # stop, length
        ("temperature", pa.float32()),
        ("oldest_version", pa.int64()),
        ("newest_version", pa.int64()),
        ("scored_by", pa.string()),  # address of the reward service, or "built-in"
        ("prompt_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),  # 0 for tokens of the environment
        ("sampled", pa.list_(pa.bool_())),  # whether the token is the model's, and trained on
        ("time", pa.timestamp("ms", tz="UTC")),
    ]
)

TEXT_COLUMNS = [name for name in SCHEMA.names if name not in ("prompt_ids", "token_ids", "logprobs", "sampled")]
"""What people read: all but token ids and logprobs."""


def num_sampled(row: Mapping[str, Any]) -> int:
    """Tokens of a stored rollout that the model made."""
    sampled = row.get("sampled")
    return len(row["token_ids"]) if sampled is None else sum(sampled)


def write_step(output_dir: Path, step: int, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes a step's rollouts in the place of what an interrupted try of the step left. Raises OSError."""
    folder = output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}.parquet"
    write_table(path, rows, SCHEMA)
    return path


def write_table(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    """Writes rows as Parquet, whole or not at all; components are a mapping or pairs. Raises OSError."""
    part = path.with_name(f".{path.name}.part")
    pairs = [{**row, "components": list(dict(row["components"]).items())} for row in rows]
    pq.write_table(pa.Table.from_pylist(pairs, schema=schema), part, compression="zstd")
    part.replace(path)


def step_files(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, file) of a job's output folder, by step."""
    folder = output_dir / FOLDER
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in found if (match := _NAME.fullmatch(path.name)))


def make_room(output_dir: Path, max_bytes: int) -> int:
    """Deletes the oldest steps until the rest has `max_bytes` at most (the newest stays); returns how many."""
    files = step_files(output_dir)
    sizes = [path.stat().st_size for _, path in files]
    deleted = 0
    while deleted < len(files) - 1 and sum(sizes[deleted:]) > max_bytes:
        files[deleted][1].unlink()
        deleted += 1
    return deleted


def read_steps(
    output_dir: Path, *, first: int = 0, last: int | None = None, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(step, rows) from step `first` to `last`, a step at a time.

    Raises:
        NotFoundError: There are none in the folder.
        DataLossError: A file cannot be read.
    """
    files = step_files(output_dir)
    if not files:
        raise NotFoundError(f"{output_dir / FOLDER} has no rollouts: give the output folder of a GRPO job")
    for step, path in files:
        if first <= step <= (step if last is None else last):
            try:
                # By our schema: columns that older files do not have are null.
                table = pq.read_table(path, columns=list(columns) if columns else None, schema=SCHEMA)
            except (OSError, pa.ArrowException) as error:
                raise DataLossError(f"{path} cannot be read: {error}") from error
            yield step, table.to_pylist(maps_as_pydicts="lossy")
