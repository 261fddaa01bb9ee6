"""What each service shows to Prometheus, as a process of its own, against docs/metrics.md."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from pathlib import Path

import pytest

from surogate.process import start_service
from surogate.telemetry.metrics import REGISTRY

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"
UNITS = "seconds|bytes|tokens|sequences|calls|groups|rollouts|jobs|pushes|requests|restarts|ends|nats|steps|versions"
PLAIN = "policy_version|checkpoint_step|hung_scorers|server_serving"
"""Names of other services' metrics that are numbers without a unit."""


def documented(section: str) -> set[str]:
    """Names in the tables of a section of docs/metrics.md."""
    text = DOCS.read_text(encoding="utf-8").split("## Prometheus\n")[1]
    (body,) = re.findall(rf"^### {section}\n(.*?)(?=^### |\Z)", text, re.M | re.S)
    return set(re.findall(r"^\|.*?`(surogate_\w+)`", body, re.M))


async def shown(service: str, folder: Path, *arguments: str) -> dict[str, tuple[str, str]]:
    """Type and help of every metric that a service has when it has just started, by name."""
    process = await start_service(f"{service}_svc", arguments, log_file=folder / "log")
    try:
        url = f"http://{process.announcement.metrics_address}/metrics"
        text = (await asyncio.to_thread(lambda: urllib.request.urlopen(url).read())).decode()
    finally:
        await process.stop()
    types = dict(re.findall(r"^# TYPE (surogate_\w+) (\w+)$", text, re.M))
    return {name: (types[name], words) for name, words in re.findall(r"^# HELP (surogate_\w+) (.+)$", text, re.M)}


@pytest.mark.parametrize(
    ("service", "sections", "arguments"),
    [
        ("orchestrator", ["Steps: orchestrator and trainer", "Orchestrator"], ["--store-url", "sqlite://"]),
        ("trainer", ["Steps: orchestrator and trainer", "Trainer"], []),
        # Not a folder: the service starts, and would fetch the model, which takes longer than this test.
        ("inference", ["Inference"], ["--model", "nobody/nothing"]),
        ("reward", ["Reward"], []),
    ],
)
async def test_a_service_shows_the_metrics_of_the_page_and_no_others(
    service: str, sections: list[str], arguments: list[str], tmp_path: Path
) -> None:
    found = await shown(service, tmp_path, *arguments)
    wanted = documented("Every service").union(*map(documented, sections))
    everywhere = documented("Steps: orchestrator and trainer")
    assert set(found) - everywhere == wanted - everywhere
    assert wanted <= set(found)
    for name, (kind, words) in found.items():
        assert words[0].isupper() or words[0].isdigit(), f"{name} needs a sentence as its help"
        assert name.endswith("_total") == (kind == "counter"), name


def test_names_say_component_and_unit() -> None:
    names = documented("Every service").union(*map(documented, ("Orchestrator", "Trainer", "Inference", "Reward")))
    form = rf"surogate_(rpc|orchestrator|trainer|inference|weights|reward)_(\w+_)?({UNITS}|{PLAIN})(_total)?"
    assert [name for name in names if not re.fullmatch(form, name)] == []


def test_step_metrics_are_documented_as_they_are_spelt() -> None:
    in_code = {metric.name for metric in REGISTRY.collect() if metric.name.startswith("surogate_step_")}
    assert documented("Steps: orchestrator and trainer") == in_code
