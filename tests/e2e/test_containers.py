"""A GRPO job across the four containers, built from the Dockerfile and locked down as the manifests have them.

`make e2e-containers` runs it: torch and vLLM make the images large and their builds long.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_wheel import checkout
from tests.helpers import containers
from tests.helpers.containers import VERSION, Engine
from tests.helpers.grpo_files import write_grpo_files
from tests.helpers.shell import steps_shown
from tests.helpers.tiny import make_tiny_model

STORAGE = os.environ.get("SUROGATE_E2E_STORAGE", "")
TARGETS = ("orchestrator", "reward", "trainer", "inference")
PORTS = {"reward": 50061, "trainer": 50062, "inference": 50063, "orchestrator": 50051}
SERVICES = {
    "reward": "surogate.v1.RewardService",
    "trainer": "surogate.v1.TrainerService",
    "inference": "surogate.v1.InferenceService",
    "orchestrator": "surogate.v1.JobService",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not STORAGE, reason="takes long: make e2e-containers"),
    pytest.mark.skipif(bool(containers.missing()), reason=containers.missing() or "can be built"),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with the four images, built unless its storage has them from before."""
    engine = Engine(Path(STORAGE).absolute())
    absent = [target for target in TARGETS if not engine.has_image(f"surogate-{target}:{VERSION}")]
    if absent:
        source = checkout(tmp_path_factory.mktemp("checkout"))
        engine.make_base()
        engine.collect_wheels(source, absent)
        engine.build(source, absent)
    try:
        yield engine
    finally:
        engine.podman("rm", "--all", "--force", "--time=2", check=False)


def start(engine: Engine, target: str, folder: Path, *arguments: str, **environment: str) -> None:
    """Starts a service in the network of the first, which has the loopback alone."""
    port = f"SUROGATE_{target.upper()}_LISTEN=127.0.0.1:{PORTS[target]}"
    flags = [f"--env={port}", f"--env=SUROGATE_{target.upper()}_METRICS_LISTEN=", "--shm-size=512m"]
    flags += [f"--env={name}={value}" for name, value in environment.items()]
    flags += [f"--volume={folder}/jobs:/var/lib/surogate/jobs", f"--volume={folder}/models:/models:ro"]
    network = "none" if target == "reward" else "container:reward"
    engine.start(target, f"surogate-{target}:{VERSION}", *arguments, flags=flags, network=network)


def test_a_grpo_job_across_the_containers(engine: Engine, tmp_path: Path) -> None:
    for name in ("jobs", "models"):
        (tmp_path / name).mkdir(mode=0o755)
    os.chown(tmp_path / "jobs", 10001, 10001)
    make_tiny_model(tmp_path / "models" / "model", std=0.1)
    files = tmp_path / "models"
    arguments = write_grpo_files(files, train={"model": "/models/model", "max_steps": 3, "save_steps": 3})
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    for path in files.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)

    start(engine, "reward", tmp_path)
    start(engine, "trainer", tmp_path, OMP_NUM_THREADS="1")
    serve = ["--model=/models/model", "--dtype=float32", "--max-num-seqs=16", "--max-lora-rank=8", "--max-model-len=96"]
    start(engine, "inference", tmp_path, *serve, "--kv-cache-bytes=67108864", OMP_NUM_THREADS="1")
    workers = [f"--{name}-address=127.0.0.1:{PORTS[name]}" for name in ("trainer", "reward")]
    workers += [f'--inference-addresses=["127.0.0.1:{PORTS["inference"]}"]']
    state = ["--launcher=static", "--store-url=sqlite:////tmp/jobs.db", "--output-root=/var/lib/surogate/jobs"]
    start(engine, "orchestrator", tmp_path, *state, *workers)
    for target, service in SERVICES.items():
        engine.wait_serving(target, service, PORTS[target], seconds=600)

    command, *rest = [f"/models/{part}" if part.endswith(".yaml") else part for part in arguments]
    job = ["surogate", command, "--server", f"127.0.0.1:{PORTS['orchestrator']}", *rest]
    out = engine.podman("exec", "orchestrator", *job)
    assert steps_shown(out) == [1, 2, 3], out
    assert "succeeded" in out
    lines = [json.loads(line) for line in (tmp_path / "jobs/out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert (tmp_path / "jobs/out/adapter_model.safetensors").stat().st_uid == 10001
    for target in reversed(SERVICES):
        assert engine.stop(target) == 0, f"{target}: {engine.podman('logs', target)}"
