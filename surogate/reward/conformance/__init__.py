"""Conformance of a reward service: asks it as a job would, and says what is wrong, where, and what to do.

`check_service` is what `surogate reward check` runs.
"""

from surogate.reward.conformance.findings import Finding, Report, Verdict
from surogate.reward.conformance.run import Wishes, check_service

__all__ = ["Finding", "Report", "Verdict", "Wishes", "check_service"]
