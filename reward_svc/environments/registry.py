"""The built-in environments."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec

from reward_svc.environments.arithmetic import Arithmetic
from reward_svc.environments.code import Code
from reward_svc.environments.exact_match import ExactMatch
from reward_svc.environments.guess_number import GuessNumber
from reward_svc.environments.json_schema import JsonSchema
from reward_svc.environments.judge import Judge
from reward_svc.environments.mathematics import Math
from reward_svc.environments.mixture import Mixture
from reward_svc.environments.regex_match import RegexMatch
from reward_svc.environments.reverse_text import ReverseText
from reward_svc.environments.shaping import Format, Length
from reward_svc.environments.verifiers_environments import Verifiers
from surogate.reward.registry import Plugin, Registry

_VERIFIERS = "; environments of the verifiers package need pip install 'surogate[verifiers]' where the service runs"


def built_in(
    *, processes: int | None = None, allow_unsafe_code: bool = False, plugins: Iterable[Plugin] = ()
) -> Registry:
    """New instances of all built-in environments, and those of packages.

    `processes`: how many worker processes an environment may have; None: one a core. `allow_unsafe_code`: whether
    `code` may run programs where there is no sandbox.
    """
    size = processes or len(os.sched_getaffinity(0))
    mixture = Mixture()
    environments = (
        ReverseText(),
        Arithmetic(),
        ExactMatch(),
        Math(size),
        Code(size, allow_unsafe=allow_unsafe_code),
        RegexMatch(),
        JsonSchema(),
        Format(),
        Length(),
        GuessNumber(),
        Judge(),
        Verifiers(),
        mixture,
    )
    mixture.registry = Registry(environments, plugins=plugins, hint="" if find_spec("verifiers") else _VERIFIERS)
    return mixture.registry
