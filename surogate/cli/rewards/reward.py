"""`surogate reward check`: conformance of a reward service, for people and as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from surogate.cli.console import standard_output
from surogate.cli.exits import FAILED, OK, reaching, usage
from surogate.cli.rewards.reward_service import START_REWARD
from surogate.reward.conformance import Finding, Report, Verdict, Wishes, check_service
from surogate.rpc import address as addresses
from surogate.visible import visible

_STYLE = {Verdict.OK: "green", Verdict.FAIL: "bold red", Verdict.ADVICE: "yellow", Verdict.SKIPPED: "dim"}


def check(address: str, environment: str | None, args: Mapping[str, Any], item_timeout: float, *, as_json: bool) -> int:
    """Checks the service and prints what was found; returns FAILED if jobs cannot use it."""
    try:
        addresses.split(address)
    except ValueError as error:
        raise usage("HOST:PORT", str(error)) from error
    with reaching("reward service", address, START_REWARD):
        report = asyncio.run(check_service(address, Wishes(environment, args, item_timeout)))
    if as_json:
        sys.stdout.write(f"{json.dumps(report.as_json(), ensure_ascii=False)}\n")
    else:
        _print(report)
    return OK if report.ok else FAILED


def _print(report: Report) -> None:
    console = standard_output()
    for subject in dict.fromkeys(finding.environment for finding in report.findings):
        title = f"environment {visible(subject)}" if subject else f"service at {report.address}"
        console.print(Text(title, style="bold"))
        table = Table.grid(padding=(0, 2))
        for finding in report.findings:
            if finding.environment == subject:
                table.add_row(*_row(finding))
        console.print(table)
        console.print()
    failed, advice = report.count(Verdict.FAIL), report.count(Verdict.ADVICE)
    verdict = f"{failed} checks failed: jobs cannot rely on this service" if failed else "jobs can use this service"
    console.print(Text(f"{report.count(Verdict.OK)} ok, {failed} failed, {advice} advised; {verdict}"))


def _row(finding: Finding) -> tuple[Text, Text, Text]:
    # What a service answers is never markup.
    text = Text(visible(finding.what))
    if finding.where:
        text.append(f"\nwhere: {finding.where}", style="dim")
    if finding.do:
        text.append(f"\ndo: {finding.do}")
    return Text(finding.verdict.value, style=_STYLE[finding.verdict]), Text(finding.check), text
