"""The built-in environments."""

from __future__ import annotations

from reward_svc.environments.arithmetic import Arithmetic
from reward_svc.environments.exact_match import ExactMatch
from reward_svc.environments.reverse_text import ReverseText
from surogate.reward.base import AnyEnvironment


def built_in() -> tuple[AnyEnvironment, ...]:
    """New instances of all built-in environments."""
    return (ReverseText(), Arithmetic(), ExactMatch())
