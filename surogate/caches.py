"""Where caches are kept: what is in them can always be made or fetched again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from surogate.errors import DataLossError

VARIABLE = "SUROGATE_CACHE_DIR"
"""Environment variable that names the folder of caches. Unset: `surogate` in the user's cache folder."""


def cache_root(kind: str) -> Path:
    """The folder of one kind of cache; one in the system's temporary folder where the user's own cannot be written.

    Raises DataLossError if the folder that `VARIABLE` names cannot be used.
    """
    named = os.environ.get(VARIABLE)
    own = Path(named).expanduser() if named else _user_caches() / "surogate"
    root = own / kind
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return root
    except OSError as error:
        if named:
            raise DataLossError(f"{VARIABLE} names {own}, which cannot be made: {error}") from error
    if named:
        raise DataLossError(f"{VARIABLE} names {own}, which cannot be written to")
    root = Path(tempfile.gettempdir()) / f"surogate-{os.getuid()}" / kind
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root


def _user_caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
