"""The order of prompts: decks that are shuffled anew for each pass over them, and which deck is next."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator_svc.grpo.groups import Prompt
from orchestrator_svc.grpo.prompts.pools import Pools
from surogate.errors import FailedPreconditionError

EVERYTHING = ""
"""Name of the only deck, where there are no ratios of environments."""


class Deck:
    """Prompts in an order without end that the seed decides."""

    def __init__(self, prompts: Sequence[Prompt], seed: str) -> None:
        self.prompts = prompts
        self._seed = seed
        self._order: list[int] = []
        self._pass = -1

    def at(self, position: int) -> Prompt:
        """The prompt at a position, from 0: each once in a pass."""
        number, place = divmod(position, len(self.prompts))
        if number != self._pass:
            self._order = list(range(len(self.prompts)))
            random.Random(f"{self._seed}/{number}").shuffle(self._order)  # noqa: S311 - an order, not a secret
            self._pass = number
        return self.prompts[self._order[place]]


@dataclass(frozen=True)
class Drawn:
    """A prompt, and where it lay: the deck goes on behind it."""

    prompt: Prompt
    deck: str
    position: int


class PromptBook:
    """All the training prompts of a job. Which one comes next depends on the seed, and on what is laid aside."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        *,
        ratios: Mapping[str, float] | None = None,
        once: bool = False,
        pools: Pools,
    ) -> None:
        """`ratios`: shares of environments, by key; `once`: draw no prompt twice."""
        self.prompts = prompts
        self.pools = pools
        self._seed = seed
        self._ratios = ratios
        self._once = once
        self._by_key = {prompt.key: prompt for prompt in prompts}
        self._decks = _decks(prompts, seed, ratios)
        self._positions = dict.fromkeys(self._decks, 0)

    def named(self, key: str) -> Prompt:
        """The prompt that an unfinished draw names.

        Raises:
            FailedPreconditionError: The environment no longer has it.
        """
        prompt = self._by_key.get(key)
        if prompt is None:
            raise FailedPreconditionError(
                f"this job drew the prompt {key}, which its environment no longer gives: restore the environment's "
                "data, or start a new job",
                reason="EXAMPLE_GONE",
            )
        return prompt

    def go_on(self, positions: Mapping[str, int]) -> None:
        """Takes up the decks at these positions."""
        self._positions |= {deck: position for deck, position in positions.items() if deck in self._decks}

    def skip(self, draws: int) -> None:
        """Passes over the first draws, as a job did that went on from a checkpoint."""
        if len(self._decks) == 1:
            self._positions = dict.fromkeys(self._decks, draws)
            return
        for ordinal in range(draws):
            self._positions[self._choose(ordinal, list(self._decks))] += 1

    def draw(self, ordinal: int) -> Drawn | None:
        """The prompt of a new draw; None when every prompt was drawn that may be drawn."""
        left = list(self._decks)
        while left:
            deck = self._choose(ordinal, left)
            drawn = self._next(deck)
            if drawn is not None:
                return drawn
            left.remove(deck)
        return None

    def _choose(self, ordinal: int, decks: Sequence[str]) -> str:
        if self._ratios is None or len(decks) == 1:
            return decks[0]
        weights = [self._ratios[deck] for deck in decks]
        chance = random.Random(f"{self._seed}/deck/{ordinal}")  # noqa: S311 - no secret
        return chance.choices(decks, weights)[0]

    def _next(self, name: str) -> Drawn | None:
        """The next prompt of a deck that is not laid aside; None when there is none in a whole pass."""
        deck, start = self._decks[name], self._positions[name]
        end = len(deck.prompts) if self._once else start + len(deck.prompts)
        for position in range(start, end):
            prompt = deck.at(position)
            if self.pools.is_drawn(prompt.key):
                self._positions[name] = position + 1
                return Drawn(prompt, name, position)
        return None


def _decks(prompts: Sequence[Prompt], seed: int, ratios: Mapping[str, float] | None) -> dict[str, Deck]:
    if ratios is None:
        return {EVERYTHING: Deck(prompts, f"{seed}")}
    return {
        key: Deck([prompt for prompt in prompts if prompt.environment == key], f"{seed}/{key}")
        for key in ratios
        if any(prompt.environment == key for prompt in prompts)
    }
