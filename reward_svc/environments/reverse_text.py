"""`reverse-text`: write a text backwards, character by character."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Self

from pydantic import Field, model_validator

from reward_svc.environments.words import WORDS
from reward_svc.rewards.lcs import lcs_ratio
from surogate.errors import InvalidInputError
from surogate.reward.arguments import bad_argument
from surogate.reward.base import Environment, EnvironmentArgs, Split
from surogate.reward.dataset import column, read_rows
from surogate.reward.splits import draw_unique, rng_for, split_rows, text_hash
from surogate.v1 import reward_pb2

MAX_TEXT = 10_000
MAX_COMPLETION = 100_000
"""Characters of a completion that are compared; further ones count as wrong."""


class ReverseTextArgs(EnvironmentArgs):
    """Arguments of `reverse-text`. Texts are the user's (`dataset`), random characters (`alphabet`), or words."""

    dataset: str | None = None
    """File of texts on the reward service's machine: .txt (a text a line), .jsonl, .json or .csv."""
    text_field: str = "text"
    """Column of `dataset` with the texts."""
    words: tuple[str, ...] | None = Field(None, min_length=1)
    """Words to draw from; unset means a list of short English words."""
    min_words: int = Field(1, ge=1, le=1000)
    """Fewest words in a text."""
    max_words: int = Field(3, ge=1, le=1000)
    """Most words in a text."""
    separator: str = " "
    """What stands between words."""
    alphabet: str | None = Field(None, min_length=1)
    """Characters to draw from instead of words, each as likely as it is often in this string."""
    min_chars: int = Field(4, ge=1, le=MAX_TEXT)
    """With `alphabet`: shortest text, in characters. With words: texts that are shorter are not used if set."""
    max_chars: int = Field(12, ge=1, le=MAX_TEXT)
    """With `alphabet`: longest text, in characters. With words: texts that are longer are not used if set."""
    instruction: str = ""
    """Put before the text in the prompt, for example `Reverse: `. Empty: the prompt is the text alone."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}")
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} is above max_chars {self.max_chars}")
        if self.alphabet is not None and self.words is not None:
            raise ValueError("alphabet and words are two ways to make a text; set one")
        return self

    def fits(self, text: str) -> bool:
        """Whether a text of words has an allowed length. Only bounds that were set count."""
        least = self.min_chars if "min_chars" in self.model_fields_set else 1
        most = self.max_chars if "max_chars" in self.model_fields_set else MAX_TEXT
        return least <= len(text) <= most


class ReverseText(Environment[ReverseTextArgs]):
    """Rewards 2·LCS/(a + b): LCS of the completion and the reversed text, a and b their lengths."""

    id = "reverse-text"
    description = "Write the text backwards. Reward: longest common subsequence with the reversed text, as a ratio."
    args_model = ReverseTextArgs

    def examples(self, args: ReverseTextArgs, split: Split, seed: int) -> Iterator[reward_pb2.Example]:
        """Yields texts to reverse; `answer` is the reversed text."""
        texts = _from_dataset(args, split, seed) if args.dataset is not None else _generated(args, split, seed)
        for text in texts:
            example = reward_pb2.Example(
                id=f"{text_hash(text):016x}", prompt=args.messages(args.instruction + text), answer=text[::-1]
            )
            example.fields["text"] = text
            yield example

    def score(
        self, args: ReverseTextArgs, example: reward_pb2.Example, rollout: reward_pb2.Rollout
    ) -> reward_pb2.Score:
        """Scores the completion, white space at its ends removed, against `example.answer`."""
        if not example.answer:
            raise InvalidInputError("reverse-text needs example.answer: the reversed text")
        completion = rollout.completion.strip()
        if len(example.answer) > MAX_TEXT:
            raise InvalidInputError(f"reverse-text scores texts of up to {MAX_TEXT} characters")
        exact = float(completion == example.answer)
        ratio = lcs_ratio(completion, example.answer, MAX_COMPLETION)
        return reward_pb2.Score(reward=ratio, components={"exact": exact})


def _generated(args: ReverseTextArgs, split: Split, seed: int) -> Iterator[str]:
    rng = rng_for(ReverseText.id, split, seed)
    draw = _characters(args, rng) if args.alphabet is not None else _words(args, rng)
    return draw_unique(draw, str, split, args.generated(split))


def _characters(args: ReverseTextArgs, rng: random.Random) -> Callable[[], str]:
    alphabet = args.alphabet or ""
    if not alphabet.strip():
        raise bad_argument("alphabet", "has nothing but white space, which scoring ignores at the ends")

    def draw() -> str:
        while True:
            length = rng.randint(args.min_chars, args.max_chars)
            text = "".join(rng.choices(alphabet, k=length))
            # White space at the ends would be stripped from the completion and could never be got right.
            if text == text.strip():
                return text

    return draw


def _words(args: ReverseTextArgs, rng: random.Random) -> Callable[[], str]:
    words = args.words or WORDS

    def draw() -> str:
        for _ in range(10_000):
            count = rng.randint(args.min_words, args.max_words)
            text = args.separator.join(rng.choices(words, k=count)).strip()
            if text and args.fits(text):
                return text
        raise bad_argument("max_chars", "no text of such words is of that length; widen min_chars and max_chars")

    return draw


def _from_dataset(args: ReverseTextArgs, split: Split, seed: int) -> list[str]:
    rows = read_rows(str(args.dataset))
    texts = list(dict.fromkeys(str(value).strip() for value in column(rows, args.text_field, "text_field")))
    texts = [text for text in texts if text and len(text) <= MAX_TEXT and args.fits(text)]
    if not texts:
        raise bad_argument("dataset", f"{args.dataset} has no text of 1 to {MAX_TEXT} characters within the bounds")
    chosen = split_rows(texts, str, split, args.eval_examples)
    rng_for(ReverseText.id, split, seed).shuffle(chosen)
    return chosen[: args.num_examples] if split is Split.TRAIN else chosen
