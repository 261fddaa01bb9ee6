"""One rank of several that train the same small sessions: `python -m tests.helpers.trainer.rank_program FOLDER`.

FOLDER/cases.json says what to train; rank 0 writes FOLDER/results-<ranks>.json. Variables as of torchrun.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.helpers.models.engine import KeepingReporter, sample, session_request
from tests.helpers.models.tiny import VOCAB_SIZE
from trainer_svc.worker import session
from trainer_svc.worker.engine import Engine
from trainer_svc.worker.model.recipe import use_recipe
from trainer_svc.worker.ranks import Ranks

BATCHES = 4
"""Micro-batches of an optimiser step, over all ranks."""


def rollouts(seed: int, count: int = 11) -> list[Any]:
    """Rollouts of uneven lengths."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        prompt, length = draw.randint(1, 9), draw.randint(1, 30)
        ids = [draw.randrange(4, VOCAB_SIZE) for _ in range(prompt + length)]
        logprobs = [-5.5 + draw.uniform(-0.3, 0.3) for _ in range(length)]
        given = {"advantage": draw.choice([-1.5, 0.5, 1.0]), "temperature": draw.choice([0.7, 1.0])}
        found.append(sample(f"rollout-{number:02}", ids, prompt, logprobs=logprobs, **given))
    return found


@contextmanager
def emulated_recipe() -> Iterator[None]:
    """Inside, recipes need no hardware: their products are computed in float32, rounded alike."""
    with patch.object(session, "check"), patch.object(session, "use_recipe", partial(use_recipe, emulate=True)):
        yield


def train(case: Mapping[str, Any], folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Trains one session; losses, gradient norms and where its checkpoint is."""
    keys = {"gradient_accumulation_steps": BATCHES // ranks.world_size, **case["train"]}
    reporter = KeepingReporter()
    engine = Engine(reporter, ranks)
    output = folder / f"{case['name']}-{ranks.world_size}"
    fields = {key: case[key] for key in ("resume_from", "merge_pushes") if key in case}
    engine.open(session_request(case["kind"], output, keys, **fields))
    start = engine.session.step
    if case["kind"] == "grpo":
        steps = [engine.train_step(step, rollouts(step)) for step in range(start + 1, keys["max_steps"] + 1)]
        engine.checkpoint(final=False)
        logprobs = engine.compute_logprobs(_tokens())
        exported = engine.export_weights(1, str(output))
    else:
        engine.run()
        steps = [reporter.steps[step] for step in sorted(reporter.steps)]
        logprobs = engine.compute_logprobs(_tokens())
        exported = engine.export_weights(1, str(folder))
    base = engine.export_weights(0, str(folder)) if engine.session.train.quantizes else None
    return {
        "losses": [step["loss"] for step in steps],
        "norms": [step["grad_norm"] for step in steps],
        "metrics": {name: steps[0].get(name) for name in ("entropy", "ratio/mean", "ratio/max", "mismatch_kl")},
        "evaluations": [values["eval/loss"] for values in reporter.evaluations.values()],
        "logprobs": [list(found.logprobs) for found in logprobs.sequences],
        "exported": [tensor.name for tensor in exported.manifest.tensors],
        "base": {tensor.name: tensor.xxh3 for tensor in base.manifest.tensors} if base else {},
        "output": str(output),
    }


def _tokens() -> Any:
    from surogate.v1 import trainer_pb2 as trainer

    return trainer.ComputeLogprobsRequest(sequences=[{"ids": list(range(10, 30))}])


def main() -> int:
    """Trains every case."""
    folder, ranks = Path(sys.argv[1]), Ranks.join()
    results = {}
    for case in json.loads((folder / "cases.json").read_text()):
        with emulated_recipe():
            results[case["name"]] = train(case, folder, ranks)
    if ranks.first:
        (folder / f"results-{ranks.world_size}.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
