"""What a check found, for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Verdict(Enum):
    """How a check ended."""

    OK = "ok"
    FAIL = "fail"
    """A job would fail, or train on something wrong."""
    ADVICE = "advice"
    """Jobs work; this would be better."""
    SKIPPED = "skipped"
    """There was nothing to check it on."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    verdict: Verdict
    what: str
    """What was seen."""
    where: str = ""
    """Method and field, and which call; empty if all is well."""
    do: str = ""
    """What to do about it; empty if all is well."""
    environment: str = ""
    """Environment id; empty for the service as a whole."""

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return {**asdict(self), "verdict": self.verdict.value}


@dataclass
class Report:
    """All findings about a service."""

    address: str
    environments: Sequence[str] = ()
    """Environments that were checked."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether a job can use the service."""
        return not self.count(Verdict.FAIL)

    def count(self, verdict: Verdict) -> int:
        """How many checks ended so."""
        return sum(finding.verdict is verdict for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON has it: counts by verdict beside the findings."""
        counts = {verdict.value: self.count(verdict) for verdict in Verdict}
        return {
            "address": self.address,
            "ok": self.ok,
            "environments": list(self.environments),
            "counts": counts,
            "findings": [finding.as_json() for finding in self.findings],
        }
