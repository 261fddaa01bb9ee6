"""The environments that a service offers: those that it was given, and those that installed packages bring."""

from __future__ import annotations

import difflib
import inspect
import threading
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, cast

from surogate.errors import FailedPreconditionError, NotFoundError
from surogate.reward.base import AnyEnvironment, Environment
from surogate.reward.composite import Composite
from surogate.telemetry.log import get_logger

GROUP = "surogate.environments"
"""Entry points of this group are environments: an instance, a decorated function, or an `Environment` class."""

_log = get_logger("reward")


class Plugin(Protocol):
    """An environment that a package brings; an `EntryPoint` is one."""

    @property
    def name(self) -> str:
        """The environment's id."""

    @property
    def value(self) -> str:
        """What it comes from, for people."""

    def load(self) -> Any:
        """Imports it."""


class Registry:
    """Environments by id. Those of packages are imported when they are first asked for."""

    def __init__(
        self, environments: Iterable[AnyEnvironment], *, plugins: Iterable[Plugin] = (), hint: str = ""
    ) -> None:
        """`hint` ends the message about an id that is not there.

        Raises TypeError for an environment without id or scoring, ValueError for an id that is there twice."""
        self._by_id: dict[str, AnyEnvironment] = {}
        for environment in environments:
            check(environment)
            if environment.id in self._by_id:
                raise ValueError(f"two environments have the id {environment.id!r}")
            self._by_id[environment.id] = environment
        self._hint = hint
        self._lock = threading.Lock()
        self._plugins: dict[str, Plugin] = {}
        for plugin in plugins:
            if plugin.name in self._by_id or plugin.name in self._plugins:
                _log.warning("an environment of a package is hidden by another", id=plugin.name, package=plugin.value)
            else:
                self._plugins[plugin.name] = plugin

    @property
    def ids(self) -> list[str]:
        """Ids, those of packages last."""
        return [*self._by_id, *(name for name in self._plugins if name not in self._by_id)]

    def loaded(self, environment_id: str) -> AnyEnvironment | None:
        """An environment if it is at hand, without importing anything."""
        return self._by_id.get(environment_id)

    def get(self, environment_id: str) -> AnyEnvironment:
        """Returns an environment. Raises NotFoundError that lists the known ids, FailedPreconditionError for one whose
        package cannot be imported."""
        found = self.loaded(environment_id)
        if found is not None:
            return found
        plugin = self._plugins.get(environment_id)
        if plugin is None:
            close = difflib.get_close_matches(environment_id, self.ids, n=1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            known = ", ".join(self.ids)
            raise NotFoundError(f"no environment {environment_id!r}{meant}; this service has {known}{self._hint}")
        with self._lock:
            if environment_id not in self._by_id:
                loaded = _load(plugin)
                loaded.open()
                self._by_id[environment_id] = loaded
        return self._by_id[environment_id]

    def usable(self) -> Iterator[AnyEnvironment]:
        """All that can be imported; others are logged."""
        for environment_id in self.ids:
            try:
                yield self.get(environment_id)
            except FailedPreconditionError as error:
                _log.warning("an installed environment cannot be used", id=environment_id, error=error.message)

    def open(self) -> None:
        """Opens the environments that are at hand."""
        for environment in list(self._by_id.values()):
            environment.open()

    def close(self) -> None:
        """Closes the environments that were used."""
        for environment in self._by_id.values():
            environment.close()


def installed() -> tuple[EntryPoint, ...]:
    """The environments that installed packages bring."""
    return tuple(entry_points(group=GROUP))


def check(environment: object) -> None:
    """Raises TypeError for what is not an environment, or has neither `score` nor `score_group`, or no id."""
    if not isinstance(environment, Environment):
        raise TypeError(f"{environment!r} is not an environment; decorate a function, or subclass Environment")
    name = type(environment).__name__
    for attribute in ("id", "description", "args_model"):
        if not getattr(environment, attribute, None):
            raise TypeError(f"{name} has no {attribute}")
    scores = environment.scores_groups or type(environment).score is not Environment.score
    if not scores and not isinstance(environment, Composite):
        raise TypeError(f"{name} has neither score nor score_group")


def _load(plugin: Plugin) -> AnyEnvironment:
    try:
        found = plugin.load()
        environment: Any = found() if inspect.isclass(found) else found
        check(environment)
    # Somebody else's module: whatever it raises, the environment cannot be used and the others can.
    except Exception as error:
        raise FailedPreconditionError(
            f"environment {plugin.name!r} cannot be loaded from {plugin.value}: {type(error).__name__}: {error}",
            reason="ENVIRONMENT_BROKEN",
        ) from error
    if environment.id != plugin.name:
        raise FailedPreconditionError(
            f"{plugin.name!r} ({plugin.value}) gives an environment with the id {environment.id!r}: make them equal",
            reason="ENVIRONMENT_BROKEN",
        )
    return cast("AnyEnvironment", environment)
