"""A Kubernetes API server of the tests' own, from the folder that KUBEBUILDER_ASSETS names.

`etcd` and `kube-apiserver` must be in it, as envtest has them; a `kube-controller-manager` beside them is used too, so
that Jobs and garbage are in the hands of Kubernetes itself. Everything listens on free ports of 127.0.0.1, has
certificates of its own, and ends with the tests.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from surogate.ports import free_port
from tests.helpers.certificates import Authority, Pair

NEEDED = ("etcd", "kube-apiserver")
_START_SECONDS = 90.0
JOBS_AS_WE_MAKE_THEM = 30
"""Minor version from which the Job controller knows all that the launcher's Jobs say; before, tests have their own."""


@dataclass(frozen=True)
class ControlPlane:
    """A running API server.

    Attributes:
        kubeconfig: Who may do everything.
        has_controllers: Whether Kubernetes' controllers run beside it.
    """

    kubeconfig: Path
    has_controllers: bool


def missing(assets: Path) -> str:
    """What a folder of programs lacks, in words; empty if it will do."""
    lacks = [name for name in NEEDED if not (assets / name).is_file()]
    return f"KUBEBUILDER_ASSETS={assets} has no {' and no '.join(lacks)}" if lacks else ""


@contextmanager
def control_plane(assets: Path) -> Iterator[ControlPlane]:
    """Starts the programs of a folder, and ends them."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="surogate-control-plane-"))
        stack.callback(shutil.rmtree, folder)
        yield _start(assets, folder, stack)


def _start(assets: Path, folder: Path, stack: ExitStack) -> ControlPlane:
    authority = Authority(folder)
    admin = authority.issue("admin", organization="system:masters")
    accounts = _account_keys(folder)
    etcd = _etcd(assets, folder, stack)
    manager = assets / "kube-controller-manager"
    port = free_port()
    url = f"https://127.0.0.1:{port}"
    kubeconfig = _write_kubeconfig(folder / "kubeconfig", url, authority.cert, admin)
    serving = authority.issue("kube-apiserver")
    flags = {
        "etcd-servers": etcd,
        "bind-address": "127.0.0.1",
        "secure-port": str(port),
        "cert-dir": str(folder),
        "tls-cert-file": str(serving.cert),
        "tls-private-key-file": str(serving.key),
        "client-ca-file": str(authority.cert),
        "authorization-mode": "RBAC",
        "service-account-issuer": "https://surogate.test",
        "service-account-signing-key-file": str(accounts.key),
        "service-account-key-file": str(accounts.cert),
        "service-cluster-ip-range": "10.0.0.0/24",
        "endpoint-reconciler-type": "none",  # it would not have an address of the loopback
    }
    if not manager.is_file():
        flags["disable-admission-plugins"] = "ServiceAccount"  # nobody makes the account that pods have by default
    _program(assets / "kube-apiserver", folder, stack, flags, lambda: _is_ready(kubeconfig))
    if manager.is_file():
        _controllers(manager, folder, stack, kubeconfig, authority.cert, accounts)
    return ControlPlane(kubeconfig, manager.is_file())


def _etcd(assets: Path, folder: Path, stack: ExitStack) -> str:
    clients, peers = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    flags = {
        "data-dir": str(folder / "etcd"),
        "listen-client-urls": clients,
        "advertise-client-urls": clients,
        "listen-peer-urls": peers,
        "initial-advertise-peer-urls": peers,
        "initial-cluster": f"default={peers}",
        "unsafe-no-fsync": "true",
    }
    _program(assets / "etcd", folder, stack, flags, lambda: _answers(clients))
    for _ in range(3):  # so that the API server's first version, from which no watch can begin, is not 1
        put = json.dumps({"key": "c3Vyb2dhdGU=", "value": ""}).encode()
        with urllib.request.urlopen(f"{clients}/v3/kv/put", data=put, timeout=10) as answer:
            answer.read()
    return clients


def _controllers(manager: Path, folder: Path, stack: ExitStack, kubeconfig: Path, ca: Path, accounts: Pair) -> None:
    minor = int("".join(filter(str.isdigit, json.loads(_get(kubeconfig, "/version"))["minor"])))
    flags = {
        "kubeconfig": str(kubeconfig),
        "authentication-kubeconfig": str(kubeconfig),
        "authorization-kubeconfig": str(kubeconfig),
        "bind-address": "127.0.0.1",
        "secure-port": str(free_port()),
        "cert-dir": str(folder),
        "leader-elect": "false",
        "service-account-private-key-file": str(accounts.key),
        "root-ca-file": str(ca),
        "controllers": "*" if minor >= JOBS_AS_WE_MAKE_THEM else "*,-job",
        "kube-api-qps": "500",
        "kube-api-burst": "500",
    }
    if minor < 24:
        flags["port"] = "0"  # else it listens without TLS, on all interfaces
    _program(manager, folder, stack, flags, lambda: _has_default_account(kubeconfig))


def _program(program: Path, folder: Path, stack: ExitStack, flags: dict[str, str], ready: Callable[[], bool]) -> None:
    """Starts a program, which ends with `stack` or with this process, and waits until it is ready."""
    log = folder / f"{program.name}.log"
    command = [str(program), *(f"--{name}={value}" for name, value in flags.items())]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, preexec_fn=_die_with_us)
    stack.callback(_end, process)
    until = time.monotonic() + _START_SECONDS
    while not ready():
        said = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        assert process.poll() is None, f"{program} ended with {process.returncode}:\n{said}"
        assert time.monotonic() < until, f"{program} is not ready after {_START_SECONDS:g} s:\n{said}"
        time.sleep(0.1)


def _die_with_us() -> None:
    """Has the kernel end a child when the thread that started it ends, whatever ended that. Linux only."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


def _account_keys(folder: Path) -> Pair:
    """The key pair that tokens of service accounts are signed with; `cert` is the public key."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pair = Pair(folder / "accounts.pub", folder / "accounts.key")
    plain = serialization.NoEncryption()
    encoding = serialization.Encoding.PEM
    pair.key.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    public = key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    pair.cert.write_bytes(public)
    return pair


def _write_kubeconfig(file: Path, url: str, ca: Path, user: Pair) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": url, "certificate-authority": str(ca)}}],
        "users": [{"name": "test", "user": {"client-certificate": str(user.cert), "client-key": str(user.key)}}],
    }
    file.write_text(yaml.safe_dump(config))
    return file


def _get(kubeconfig: Path, path: str) -> str:
    from kubernetes import client, config

    settings: Any = client.Configuration()
    config.load_kube_config(config_file=str(kubeconfig), client_configuration=settings)
    settings.retries = False
    answer = client.ApiClient(settings).rest_client.pool_manager.request("GET", settings.host + path, timeout=5)
    assert answer.status == 200, f"{path}: {answer.status}"
    return str(answer.data.decode())


def _is_ready(kubeconfig: Path) -> bool:
    return _found(kubeconfig, "/readyz")


def _has_default_account(kubeconfig: Path) -> bool:
    """Whether the controllers are at work: one of them makes this account."""
    return _found(kubeconfig, "/api/v1/namespaces/default/serviceaccounts/default")


def _found(kubeconfig: Path, path: str) -> bool:
    from urllib3.exceptions import HTTPError

    try:
        _get(kubeconfig, path)
    except (AssertionError, HTTPError):
        return False
    return True


def _answers(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0
