"""`python -m trainer_svc.worker [--fd N]`: a process that holds torch. Started by the trainer's front, one a rank.

Rank 0 has the socket to the front; the others, without `--fd`, follow it. They find each other by torchrun's variables.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from surogate.process import die_with_parent
from trainer_svc.worker_protocol import WorkerServer


def main() -> int:
    """Serves the front on the inherited socket, or follows rank 0, until it says stop. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer_svc.worker", description=__doc__)
    parser.add_argument("--fd", type=int, help="file descriptor of the socket to the trainer's front (rank 0)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    _set_environment()
    if arguments.fd is None:
        die_with_parent()
        from trainer_svc.worker.follower import run

        return run()
    server = WorkerServer(arguments.fd)
    from trainer_svc.worker.engine import Engine
    from trainer_svc.worker.ranks import Ranks

    ranks = Ranks.join()
    return server.serve(Engine(server, ranks), ranks)


def _set_environment() -> None:
    """What the libraries read when they are loaded: no progress bars or chatter, and threads that do not spin.

    Spinning threads of two processes that share cores slow each other down many times over.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("httpx", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
