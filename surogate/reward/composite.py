"""Environments whose reward is made of other environments' rewards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from surogate.reward.base import AnyEnvironment
from surogate.reward.outcome import Outcome
from surogate.reward.prompts import DatasetArgs, DatasetEnvironment

CompositeArgsT = TypeVar("CompositeArgsT", bound=DatasetArgs)


@dataclass(frozen=True)
class Part:
    """One environment of several, with its validated arguments."""

    environment: AnyEnvironment
    args: Any


class Composite(DatasetEnvironment[CompositeArgsT]):
    """The service scores a group with each part, as it would alone, and then has `combine` make one of them."""

    @abstractmethod
    def parts(self, args: CompositeArgsT) -> Sequence[Part]:
        """The parts. Raises InvalidInputError for arguments that a part refuses."""

    @abstractmethod
    def combine(self, args: CompositeArgsT, outcomes: Sequence[Outcome]) -> Outcome:
        """The outcome for one rollout, from those of the parts in order."""
