"""Alerts and boards against the metrics that there are, and against Prometheus' own checker."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from surogate.telemetry.metrics import REGISTRY

ROOT = Path(__file__).parents[3]
MONITORING = ROOT / "k8s" / "components" / "monitoring"
RULES = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())["spec"]
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
BOARDS = sorted((MONITORING / "dashboards").glob("*.json"))
SCRAPED = {"namespace", "pod", "component", "le"}
"""Labels that come with the scrape, and with histograms."""

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: apt install prometheus")


def expressions(board: Path) -> list[str]:
    """PromQL of a board, with Grafana's variables filled in."""
    data = json.loads(board.read_text())
    found = [target["expr"] for panel in data["panels"] for target in panel.get("targets", [])]
    return [
        expr.replace("$__rate_interval", "5m").replace("$namespace", ".*").replace("$job_id", ".*") for expr in found
    ]


def everything() -> list[str]:
    """Every expression of rules and boards."""
    return [rule["expr"] for rule in ALERTS.values()] + [expr for board in BOARDS for expr in expressions(board)]


def series() -> dict[str, set[str]]:
    """Names of the series that the services have, with their labels."""
    for package in ("orchestrator_svc", "trainer_svc", "inference_svc", "surogate.reward", "surogate.weights"):
        importlib.import_module(f"{package}.metrics")
    owners = REGISTRY._collector_to_names
    ours = {name: set(getattr(owner, "_labelnames", ())) for owner, names in owners.items() for name in names}
    return {metric.name: set() for metric in REGISTRY.collect()} | ours


def test_every_metric_that_is_named_exists() -> None:
    there = series()
    named = {name for expr in everything() for name in re.findall(r"\b(?:surogate|process)_[a-z_]+", expr)}
    assert named, "the boards name metrics"
    assert named - set(there) == set()


def test_every_metric_that_a_manifest_names_exists() -> None:
    there = series()
    text = "\n".join(path.read_text() for path in (ROOT / "k8s").rglob("*.y*ml"))
    named = set(re.findall(r"\bsurogate_(?:rpc|step|orchestrator|trainer|inference|weights|reward)_[a-z_]+", text))
    assert named - set(there) == set()


def test_selectors_use_labels_that_the_metrics_have() -> None:
    there = series()
    for expr in everything():
        for name, selector in re.findall(r"\b(surogate_[a-z_]+)\{([^}]*)\}", expr):
            used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert used <= there[name] | SCRAPED, (name, expr)


def test_metrics_of_vllm_that_are_named_exist() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text(encoding="utf-8")
    named = {name for expr in everything() for name in re.findall(r"vllm:[a-z_]+", expr)}
    assert "vllm:num_requests_waiting" in named
    assert {name for name in named if f'name="{name}"' not in source} == set()


@pytest.mark.parametrize("alert", ALERTS)
def test_alerts_say_what_is_wrong_and_where_to_read_on(alert: str) -> None:
    rule = ALERTS[alert]
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["labels"]["severity"] in {"warning", "critical"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = {line[3:].lower() for line in (ROOT / page).read_text().splitlines() if line.startswith("## ")}
    assert anchor in headings


@pytest.mark.parametrize("board", BOARDS, ids=lambda path: path.stem)
def test_boards_are_whole(board: Path) -> None:
    data = json.loads(board.read_text())
    assert data["uid"] == f"surogate-{board.stem}"
    panels = [panel for panel in data["panels"] if panel["type"] != "row"]
    assert panels
    assert len({panel["id"] for panel in data["panels"]}) == len(data["panels"])
    for panel in panels:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
            assert labels <= grouped, f"{panel['title']}: the legend names labels that are summed away"
    listed = yaml.safe_load((MONITORING / "kustomization.yaml").read_text())["configMapGenerator"][0]["files"]
    assert f"dashboards/{board.name}" in listed


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=180, check=False)


@promtool
def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(RULES))
    done = run("check", "rules", "--lint=all", "--lint-fatal", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


@promtool
@pytest.mark.parametrize("board", BOARDS, ids=lambda path: path.stem)
def test_prometheus_can_parse_what_a_board_asks(board: Path, tmp_path: Path) -> None:
    rules = [{"record": f"board:{index}", "expr": expr} for index, expr in enumerate(expressions(board))]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    done = run("check", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


JOB = 'namespace="s",job_id="j"'
AT = "2h"
# By alert: series that must make it fire at `AT` with these labels, and series that must not. A minute between values.
CASES: dict[str, tuple[list[tuple[str, str]], dict[str, str], list[tuple[str, str]]]] = {
    "SurogateNoStep": (
        [(f'surogate_step_last_timestamp_seconds{{{JOB},component="orchestrator"}}', "60x130")],
        {"namespace": "s", "job_id": "j"},
        [(f'surogate_step_last_timestamp_seconds{{{JOB},component="orchestrator"}}', "0+60x130")],
    ),
    "SurogateMismatchHigh": (
        [(f"surogate_step_mismatch_kl_nats{{{JOB}}}", "0.2x130")],
        {"namespace": "s", "job_id": "j"},
        [(f"surogate_step_mismatch_kl_nats{{{JOB}}}", "0.001x110 0.2x5 0.001x20")],
    ),
    "SurogateMaskedFractionHigh": (
        [(f"surogate_step_masked_fraction{{{JOB}}}", "0.7x130")],
        {"namespace": "s", "job_id": "j"},
        [(f"surogate_step_masked_fraction{{{JOB}}}", "0.1x130")],
    ),
    "SurogateUpdatesSkipped": (
        [(f"surogate_step_update_skipped{{{JOB}}}", "0x110 1x20")],
        {"namespace": "s", "job_id": "j"},
        [(f"surogate_step_update_skipped{{{JOB}}}", "1x10 0x120")],
    ),
    "SurogateRewardErrors": (
        [
            ('surogate_reward_rollouts_total{namespace="s",environment="e",result="failed"}', "0+1x130"),
            ('surogate_reward_rollouts_total{namespace="s",environment="e",result="scored"}', "0+9x130"),
        ],
        {"namespace": "s", "environment": "e"},
        [
            ('surogate_reward_rollouts_total{namespace="s",environment="e",result="failed"}', "0+1x130"),
            ('surogate_reward_rollouts_total{namespace="s",environment="e",result="scored"}', "0+99x130"),
        ],
    ),
    "SurogateRewardGroupsLost": (
        [
            (f'surogate_orchestrator_groups_total{{{JOB},outcome="reward"}}', "0+1x130"),
            (f'surogate_orchestrator_groups_total{{{JOB},outcome="trained"}}', "0+4x130"),
        ],
        {"namespace": "s", "job_id": "j"},
        [
            (f'surogate_orchestrator_groups_total{{{JOB},outcome="zero_signal"}}', "0+4x130"),
            (f'surogate_orchestrator_groups_total{{{JOB},outcome="trained"}}', "0+4x130"),
        ],
    ),
    "SurogatePushFailing": (
        [('surogate_trainer_pushes_total{namespace="s",pod="t",result="failed"}', "0x110 0+1x20")],
        {"namespace": "s", "pod": "t"},
        [
            ('surogate_trainer_pushes_total{namespace="s",pod="t",result="failed"}', "0x110 1x20"),
            ('surogate_trainer_pushes_total{namespace="s",pod="t",result="committed"}', "0+1x130"),
        ],
    ),
    "SurogateOldWeightsServed": (
        [(f'surogate_orchestrator_replica_lag_versions{{{JOB},replica="inference-1"}}', "0x100 1+0.1x30")],
        {"namespace": "s", "job_id": "j", "replica": "inference-1"},
        [(f'surogate_orchestrator_replica_lag_versions{{{JOB},replica="inference-1"}}', "0x110 1x5 0x20")],
    ),
    "SurogateNotServing": (
        [('surogate_rpc_server_serving{namespace="s",pod="p",service="x"}', "1x90 0x40")],
        {"namespace": "s", "pod": "p", "service": "x"},
        [('surogate_rpc_server_serving{namespace="s",pod="p",service="x"}', "1x110 0x20")],
    ),
    "SurogateJobStoreFailing": (
        [('surogate_orchestrator_store_seconds_count{namespace="s",access="write",result="unavailable"}', "0+1x130")],
        {"namespace": "s"},
        [('surogate_orchestrator_store_seconds_count{namespace="s",access="write",result="ok"}', "0+9x130")],
    ),
    "SurogateRpcErrors": (
        [
            ('surogate_rpc_server_seconds_count{namespace="s",service="x",method="m",code="INTERNAL"}', "0+1x130"),
            ('surogate_rpc_server_seconds_count{namespace="s",service="x",method="m",code="OK"}', "0+9x130"),
        ],
        {"namespace": "s", "service": "x", "method": "m"},
        [
            ('surogate_rpc_server_seconds_count{namespace="s",service="x",method="m",code="NOT_FOUND"}', "0+9x130"),
            ('surogate_rpc_server_seconds_count{namespace="s",service="x",method="m",code="OK"}', "0+9x130"),
        ],
    ),
    "SurogateWorkersRestart": (
        [('surogate_orchestrator_worker_restarts_total{namespace="s",component="trainer"}', "0x100 1+0.5x30")],
        {"namespace": "s", "component": "trainer"},
        [('surogate_orchestrator_worker_restarts_total{namespace="s",component="trainer"}', "0x100 1x30")],
    ),
    "SurogateJobsFail": (
        [('surogate_orchestrator_job_ends_total{namespace="s",kind="sft",state="FAILED"}', "0x110 1x20")],
        {"namespace": "s", "kind": "sft"},
        [('surogate_orchestrator_job_ends_total{namespace="s",kind="sft",state="SUCCEEDED"}', "0x110 1x20")],
    ),
}


def test_each_alert_has_a_case() -> None:
    assert set(CASES) == set(ALERTS)


@promtool
@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_when_it_should_and_only_then(alert: str, tmp_path: Path) -> None:
    firing, labels, quiet = CASES[alert]
    expected = [{"exp_labels": {"severity": ALERTS[alert]["labels"]["severity"], **labels}}]
    cases = {"rule_files": ["rules.yaml"], "tests": [case(alert, firing, expected), case(alert, quiet, [])]}
    # The texts are templates, which `check rules` has parsed: left out here, or each would stand twice.
    rules = [{key: value for key, value in rule.items() if key != "annotations"} for rule in ALERTS.values()]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "surogate", "rules": rules}]}))
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases))
    done = run("test", "rules", str(tmp_path / "cases.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


def case(alert: str, given: list[tuple[str, str]], expected: list[Any]) -> dict[str, Any]:
    """One test of promtool's."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in given],
        "alert_rule_test": [{"eval_time": AT, "alertname": alert, "exp_alerts": expected}],
    }
