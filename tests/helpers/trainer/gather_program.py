"""One rank of several that write what they hold in shares: `python -m tests.helpers.trainer.gather_program FOLDER`.

FOLDER/model is trained; each rank writes FOLDER/rise-<rank>.json, by how many bytes its memory rose at each writing.
Variables as of torchrun.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

from tests.helpers.models.engine import KeepingReporter, session_request
from tests.helpers.peak import rise
from tests.helpers.trainer.rank_program import rollouts
from trainer_svc.worker.checkpoints.checkpoint import write_checkpoint, write_final
from trainer_svc.worker.engine import Engine
from trainer_svc.worker.export import export_weights
from trainer_svc.worker.ranks import Ranks


def main() -> int:
    """A checkpoint before the first step, and after it a checkpoint, the final model and a push."""
    folder, ranks = Path(sys.argv[1]), Ranks.join()
    engine = Engine(KeepingReporter(), ranks)
    keys = {
        "model": str(folder / "model"), "torch_dtype": "bfloat16", "optimizer": "adamw", "lora": False, "zero_level": 3,
        "sequence_len": 64, "max_steps": 2, "recompute": False,
    }  # fmt: skip
    engine.open(session_request("grpo", folder / "output", keys))
    session = engine.session
    write_checkpoint(session)
    engine.train_step(1, rollouts(1, count=2))
    works = {
        "checkpoint": lambda: write_checkpoint(session),
        "final": lambda: write_final(session),
        "push": lambda: export_weights(session, 1, folder),
    }
    found = {}
    for name, work in works.items():
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what is taken
        with rise() as risen:
            work()
        found[name] = risen.size
    (folder / f"rise-{ranks.rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
