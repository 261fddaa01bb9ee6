"""PT, SFT and GRPO jobs through the overlay cpu-kind, on the cluster of KUBECONFIG: `make e2e-cluster`.

The images must be where the cluster finds them (`kind load docker-image surogate-trainer:0.1.0 …`).
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.helpers.grpo.grpo_files import write_grpo_files
from tests.helpers.manifests.shipped import NO_KUBECTL, ROOT
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.shell import Shell, steps_shown

WANTED = os.environ.get("SUROGATE_E2E_CLUSTER", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not WANTED, reason="needs a cluster: make e2e-cluster KUBECONFIG=…"),
    pytest.mark.skipif(bool(NO_KUBECTL), reason=NO_KUBECTL or "kubectl is there"),
]
OVERLAY = ROOT / "k8s" / "overlays" / "cpu-kind"
ORCHESTRATOR = "deployment/surogate-orchestrator"


def kubectl(*arguments: str, stdin: bytes | None = None, timeout: float = 600) -> str:
    """`kubectl -n surogate ARGUMENTS`; its output. Raises AssertionError with what it says."""
    command = ["kubectl", "--namespace=surogate", *arguments]
    ran = subprocess.run(command, input=stdin, capture_output=True, timeout=timeout, check=False)
    assert ran.returncode == 0, f"{' '.join(command)}: {ran.stderr.decode()}"
    return ran.stdout.decode()


def copy_to_models(folder: Path) -> None:
    """Puts what is in a folder on the volume of models, through the orchestrator's pod."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for entry in sorted(folder.iterdir()):  # not the folder: the volume's own belongs to root
            archive.add(entry, arcname=entry.name)
    kubectl("exec", "--stdin", ORCHESTRATOR, "--", "tar", "--extract", "--no-same-owner", "--directory=/models",
            stdin=packed.getvalue())  # fmt: skip


@contextmanager
def forwarded() -> Iterator[str]:
    """The orchestrator's address on this machine."""
    command = ["kubectl", "--namespace=surogate", "port-forward", "service/surogate-orchestrator", ":50051"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())
            assert found is not None, "kubectl port-forward says no port"
            yield found[0]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A folder to run `surogate` in, with the installed orchestrator as its server, and a model on the cluster."""
    folder = tmp_path_factory.mktemp("cluster")
    kubectl("apply", "--kustomize", str(OVERLAY))
    for name in ("surogate-orchestrator", "surogate-reward"):
        kubectl("rollout", "status", f"deployment/{name}", "--timeout=300s")
    files = folder / "files"
    make_tiny_model(files / "model", std=0.1)
    lines = [json.dumps({"text": f"{i} follows {i - 1}"}) for i in range(1, 200)]
    (files / "text.jsonl").write_text("\n".join(lines))
    pairs = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in range(200)
    ]
    (files / "chat.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    copy_to_models(files)
    with forwarded() as address:
        yield Shell(folder, {"SUROGATE_SERVER": address})


TRAIN = {
    "model": "/models/model",
    "torch_dtype": "float32",
    "sequence_len": 64,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 4,
    "save_steps": 2,
    "optimizer": "adamw",
    "validation_split_ratio": 0.0,
}


@pytest.mark.parametrize(
    ("kind", "dataset"),
    [
        ("pt", {"path": "/models/text.jsonl", "type": "text", "text_field": "text"}),
        ("sft", {"path": "/models/chat.jsonl", "type": "conversation", "messages_field": "messages"}),
    ],
)
def test_a_training_job(shell: Shell, kind: str, dataset: dict[str, str]) -> None:
    (shell.folder / f"{kind}.yaml").write_text(yaml.safe_dump({**TRAIN, "datasets": [dataset]}))
    code, out, err = shell.run(kind, f"{kind}.yaml", timeout=1200)
    assert code == 0, out + err
    assert steps_shown(out)[-1] == 4
    assert nothing_is_left()


def test_a_grpo_job(shell: Shell) -> None:
    arguments = write_grpo_files(shell.folder, train={"model": "/models/model", "max_steps": 3, "save_steps": 3})
    code, out, err = shell.run(*arguments, timeout=1800)
    assert code == 0, out + err
    assert steps_shown(out) == [1, 2, 3]
    assert nothing_is_left()


def nothing_is_left() -> bool:
    """Whether all that ended jobs had is gone within two minutes."""
    for _ in range(60):
        if not kubectl("get", "jobs,services,pods", "--selector=surogate.dev/job", "--output=name").strip():
            return True
        time.sleep(2)
    return False
