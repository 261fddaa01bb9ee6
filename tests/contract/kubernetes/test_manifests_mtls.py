"""The component mtls-cert-manager, with certificates as it has them made: with the variables of the rendered manifests
services reach each other by address, and nobody else reaches the workers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from surogate.config.service import parse_settings
from surogate.errors import UnavailableError
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.rpc.health import is_serving
from surogate.rpc.server import RpcServer
from surogate.v1 import reward_pb2, reward_pb2_grpc
from tests.helpers.certificates import Authority, Pair
from tests.helpers.manifests.objects import Cluster
from tests.helpers.manifests.shipped import NO_KUBECTL, cluster
from tests.helpers.rpc import serving

pytestmark = pytest.mark.skipif(bool(NO_KUBECTL), reason=NO_KUBECTL or "kubectl is there")
FOLDER = "/etc/surogate/tls"
REWARD = "surogate.v1.RewardService"


class Rewards(reward_pb2_grpc.RewardServiceServicer):
    async def ListEnvironments(self, request: object, context: object) -> reward_pb2.ListEnvironmentsResponse:
        return reward_pb2.ListEnvironmentsResponse()


def certificate(shown: Cluster, authority: Authority, name: str) -> Pair:
    """What cert-manager makes of a Certificate: its names, and no others."""
    found = shown.find("Certificate", name)
    assert found is not None
    return authority.issue(name, *found["spec"]["dnsNames"])


def in_place(variables: Mapping[str, str], authority: Authority, pair: Pair) -> dict[str, str]:
    """Variables whose files are where the test has them, in place of the mounted Secret."""
    files = {"ca.crt": authority.cert, "tls.crt": pair.cert, "tls.key": pair.key}
    places = {f"{FOLDER}/{name}": str(path) for name, path in files.items()}
    return {key: places.get(value, value) for key, value in variables.items()}


def of_the_orchestrator(shown: Cluster) -> dict[str, str]:
    """Variables of its container."""
    found = shown.find("Deployment", "surogate-orchestrator")
    assert found is not None
    (container,) = found["spec"]["template"]["spec"]["containers"]
    return {variable["name"]: variable.get("value", "") for variable in container["env"]}


async def call(address: str, variables: Mapping[str, str]) -> None:
    """A call as a service with these variables makes it."""
    async with open_channel(address, ClientSecurity.from_env(variables)) as channel:
        await reward_pb2_grpc.RewardServiceStub(channel).ListEnvironments(reward_pb2.ListEnvironmentsRequest())


async def test_the_orchestrator_reaches_a_worker_and_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reward_svc.settings import BuiltInSettings

    shown, authority = cluster("overlays/gpu-multinode"), Authority(tmp_path)
    shared = shown.find("ConfigMap", "surogate-workers")
    assert shared is not None
    worker = in_place(shared["data"], authority, certificate(shown, authority, "surogate-worker"))
    own = certificate(shown, authority, "surogate-orchestrator")
    orchestrator = in_place(of_the_orchestrator(shown), authority, own)
    for name, value in worker.items():
        if name.startswith("SUROGATE_REWARD_") and not name.endswith("LISTEN"):
            monkeypatch.setenv(name, value)
    settings = parse_settings(BuiltInSettings, ["--health-listen=127.0.0.1:0"])

    def register(server: RpcServer) -> None:
        server.add(reward_pb2_grpc.add_RewardServiceServicer_to_server, Rewards(), REWARD)

    other = Authority(tmp_path, "other").issue("stranger")
    stranger = {**orchestrator, "SUROGATE_TLS_CERT": str(other.cert), "SUROGATE_TLS_KEY": str(other.key)}
    async with serving(register, settings) as server:
        for known in (orchestrator, worker):  # a trainer calls replicas with what all workers have
            await call(server.address, known)
        for unknown in (stranger, {}):
            with pytest.raises(UnavailableError):
                await call(server.address, unknown)
        async with open_channel(server.health_address, ClientSecurity()) as channel:
            assert await is_serving(channel, REWARD), "the kubelet's probe has no certificate"
