"""`python -m tests.helpers.trainer.trainer_front_process`: the trainer service as it is, with the fake worker."""

from __future__ import annotations

import functools
import sys

from surogate.service import main
from tests.helpers.trainer import fake_worker
from trainer_svc.service import lifespan
from trainer_svc.settings import TrainerSettings

if __name__ == "__main__":
    sys.exit(main(TrainerSettings, functools.partial(lifespan, worker_command=fake_worker.COMMAND)))
