"""The real training worker, which ends as by kill -9 in the middle of its second checkpoint: a file is half written."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from trainer_svc.worker import __main__ as worker
from trainer_svc.worker.checkpoints import checkpoint

FILES_OF_A_CHECKPOINT = 2
"""Written by `save_file` in trainer_state: the optimiser's and the random state."""


def main() -> None:
    """Runs the worker."""
    save, count = checkpoint.save_file, 0

    def save_or_die(tensors: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        save(tensors, path, *args, **kwargs)
        count += 1
        if count == FILES_OF_A_CHECKPOINT + 1:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = save_or_die
    worker.main()


if __name__ == "__main__":
    main()
