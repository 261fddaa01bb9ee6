"""The four services as containers, in one network that has the loopback alone, and a GRPO job across them."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.container_images.backing import url
from tests.helpers.container_images.containers import VERSION, Engine
from tests.helpers.grpo.grpo_files import write_grpo_files
from tests.helpers.models.tiny import make_tiny_model

PORTS = {"reward": 50061, "trainer": 50062, "inference": 50063, "orchestrator": 50051}
"""In the order in which they start; the first has the network, and ends last."""
SERVICES = {
    "reward": "surogate.v1.RewardService",
    "trainer": "surogate.v1.TrainerService",
    "inference": "surogate.v1.InferenceService",
    "orchestrator": "surogate.v1.JobService",
}
_MODEL, _TEXTS = "model", "texts.txt"
_SERVE = (
    "--dtype=float32",
    "--max-num-seqs=16",
    "--max-lora-rank=8",
    "--max-model-len=96",
    "--kv-cache-bytes=67108864",
)


def write_stored(folder: Path) -> None:
    """What the job reads from the store: a model, and texts to reverse."""
    make_tiny_model(folder / _MODEL, std=0.1)
    source = random.Random(0)
    texts = ("".join(source.choices(string.ascii_lowercase, k=source.randint(16, 32))) for _ in range(64))
    (folder / _TEXTS).write_text("\n".join(texts))


def write_job(folder: Path, run: str) -> list[str]:
    """The job's files, to be mounted at /files: three steps, with model, prompts and checkpoints in the store; the
    command's arguments."""
    train = {"model": url(_MODEL), "checkpoint_dir": url(run), "max_steps": 3, "save_steps": 3}
    env = [{"id": "reverse-text", "args": {"dataset": url(_TEXTS)}}]
    arguments = write_grpo_files(folder, train=train, orch={"env": env})
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    return [f"/files/{part}" if part.endswith(".yaml") else part for part in arguments]


def start(engine: Engine, target: str, environment: Mapping[str, str], *flags: str) -> None:
    """Starts a service; the orchestrator knows the others by their addresses."""
    address = f"SUROGATE_{target.upper()}_LISTEN=127.0.0.1:{PORTS[target]}"
    settings = {**environment, "OMP_NUM_THREADS": "1", f"SUROGATE_{target.upper()}_METRICS_LISTEN": ""}
    given = [f"--env={address}", *(f"--env={name}={value}" for name, value in settings.items())]
    network = "none" if target == "reward" else "container:reward"
    more = ["--shm-size=512m", "--tmpfs=/var/lib/surogate:mode=0700,U", *flags]
    arguments = {"inference": [f"--model={url(_MODEL)}", *_SERVE], "orchestrator": _orchestrator()}.get(target, [])
    engine.start(target, f"surogate-{target}:{VERSION}", *arguments, flags=[*given, *more], network=network)


def _orchestrator() -> list[str]:
    workers = [f"--{name}-address=127.0.0.1:{PORTS[name]}" for name in ("trainer", "reward")]
    workers += [f'--inference-addresses=["127.0.0.1:{PORTS["inference"]}"]']
    state = ["--launcher=static", "--store-url=sqlite:////tmp/jobs.db", "--output-root=/var/lib/surogate/jobs"]
    return [*state, *workers]
