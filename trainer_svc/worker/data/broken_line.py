"""Finds the line of a JSON Lines file that is wrong: the `datasets` library counts rows in a block only."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def first_broken_line(files: Iterable[Path]) -> str | None:
    """`FILE:LINE: what is wrong` of the first line that is no JSON object; None where there is none.

    Files that do not end in .jsonl are passed over, and so are empty lines.
    """
    for file in files:
        if file.suffix.lower() != ".jsonl":
            continue
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip() and (wrong := _wrong_with(line)):
                    return f"{file}:{number}: {wrong}"
    return None


def _wrong_with(line: bytes) -> str | None:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start + 1} of the line)"
    except UnicodeEncodeError as error:
        return f"has half of a surrogate pair (\\u{ord(error.object[error.start]):04x}), which is no character"
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} (column {error.colno})"
    return None if isinstance(row, dict) else f"is {type(row).__name__}, and a row is an object: {{...}}"
