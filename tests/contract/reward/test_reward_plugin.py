"""A package with an environment, installed by pip, is there in the built-in service by its id."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from surogate.process import start_service
from surogate.rpc.channel import ClientSecurity, open_channel
from surogate.v1 import reward_pb2, reward_pb2_grpc
from tests.helpers.reward.rewards import group, outcomes

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "my-env"
version = "0.1.0"
[project.entry-points."surogate.environments"]
my-env = "my_env:shout"
[tool.hatch.build.targets.wheel]
packages = ["my_env.py"]
"""
MODULE = """\
from surogate.reward import reward

@reward("my-env", examples=[{"prompt": f"Shout {n}"} for n in range(20)])
def shout(completion):
    "Share of capitals."
    return sum(map(str.isupper, completion)) / max(len(completion), 1)
"""


async def test_an_installed_environment_is_served_by_its_id(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "my_env.py").write_text(MODULE)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    await asyncio.to_thread(subprocess.run, [*install, "--target", str(site), str(source)], check=True, timeout=240)

    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    service = await start_service("reward_svc", log_file=tmp_path / "log", environment={"PYTHONPATH": path})
    try:
        async with open_channel(service.address, ClientSecurity()) as channel:
            reward = reward_pb2_grpc.RewardServiceStub(channel)
            listed = (await reward.ListEnvironments(reward_pb2.ListEnvironmentsRequest())).environments
            assert {"arithmetic", "my-env"} <= {item.id for item in listed}
            assert outcomes(await reward.ScoreRollouts(group("my-env", "AB", "Ab"))) == [1.0, 0.5]
            prompts = reward_pb2_grpc.EnvironmentServiceStub(channel).ListExamples(
                reward_pb2.ListExamplesRequest(environment="my-env", split="SPLIT_TRAIN")
            )
            assert len([example async for example in prompts]) == 18
    finally:
        assert await service.stop() == 0
