"""The built-in environments, by id."""

from __future__ import annotations

from typing import Any

from reward_svc.environments.arithmetic import Arithmetic
from reward_svc.environments.base import Environment
from reward_svc.environments.exact_match import ExactMatch
from reward_svc.environments.reverse_text import ReverseText
from surogate.errors import NotFoundError

AnyEnvironment = Environment[Any]

BUILT_IN: tuple[AnyEnvironment, ...] = (ReverseText(), Arithmetic(), ExactMatch())


class Registry:
    """Environments that a reward service offers."""

    def __init__(self, environments: tuple[AnyEnvironment, ...] = BUILT_IN) -> None:
        self._by_id = {environment.id: environment for environment in environments}

    def __iter__(self) -> Any:
        return iter(self._by_id.values())

    def get(self, environment_id: str) -> AnyEnvironment:
        """Returns an environment. Raises NotFoundError that lists the known ids."""
        if environment_id not in self._by_id:
            known = ", ".join(self._by_id)
            raise NotFoundError(f"no environment {environment_id!r}; this service has {known}")
        return self._by_id[environment_id]
