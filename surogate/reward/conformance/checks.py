"""The checks of one environment. Each asks something that jobs ask sooner or later, and tells what it saw."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from surogate.errors import DeadlineError, InvalidInputError, SurogateError
from surogate.reward.conformance.findings import Finding, Verdict
from surogate.reward.conformance.subject import Answer, Reward, Subject

_SCORE = "RewardService.ScoreRollouts"
_AT_ONCE = 16
_LARGE_GROUP = 256
_LARGE_BYTES = 6 * 2**20
_SLACK = 1.0
"""Seconds that an answer may be late before it counts as late."""
_TRIES = 3
"""Answers that must all be late: a busy machine delays one, and a service that keeps no time all of them."""
_IN_TURN = 0.6
"""Share of the time of single groups beyond which groups were scored in turn: a single one waits for the network
too."""
_CANCELLED_AFTER = (0.02, 0.2)
"""Seconds after which calls are given up: some while they are read, some while they are scored."""

UNICODE = (
    "Ünïcödé",
    "日本語のテキスト",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🇫🇷",
    "e\u0301 \u200b\u202e\ufeff",
    "\x00\x01\x7f",
    "\U0010ffff",
    "\r\n\t",
)


@dataclass(frozen=True)
class Seen:
    """What a check saw; the name of the check and the environment are added by who runs it."""

    verdict: Verdict
    what: str
    do: str = ""
    where: str = _SCORE


Check = Callable[[Subject], Awaitable[Seen]]


def _ok(what: str) -> Seen:
    return Seen(Verdict.OK, what)


def _fail(what: str, do: str, where: str = _SCORE) -> Seen:
    return Seen(Verdict.FAIL, what, do, where)


def _advice(what: str, do: str, where: str = _SCORE) -> Seen:
    return Seen(Verdict.ADVICE, what, do, where)


def ordinary(subject: Subject) -> list[str]:
    """Four completions as models write them, the example's own answer first."""
    answer = subject.example.answer
    return [answer or "An answer.", f"The answer is {answer or 42}.", "I do not know, sorry.", "one two three 7"]


async def scores(subject: Subject) -> Seen:
    """An ordinary group earns scores. A failure is the arguments' where the service could not give an example."""
    bad = Verdict.SKIPPED if subject.unfed else Verdict.FAIL
    do = "give the arguments of the job with --set KEY=VALUE, for example --set dataset=prompts.jsonl"
    try:
        answer = await subject.ask(ordinary(subject), "an ordinary group")
    except InvalidInputError as error:
        return Seen(bad, f"the arguments are refused: {error.message}", do, "ScoreRolloutsRequest.args")
    if not any(answer.scored):
        said = f": {answer.errors[0]}" if answer.errors else ""
        return Seen(bad, f"none of {len(answer.rewards)} ordinary completions was scored{said}", do)
    found = ", ".join("error" if reward is None else f"{reward:g}" for reward in answer.rewards)
    return _ok(f"an ordinary group earned {found}, in {answer.seconds * 1000:.0f} ms")


async def single(subject: Subject) -> Seen:
    """A group of one."""
    await subject.ask(ordinary(subject)[:1], "a group of one")
    return _ok("a group of one is answered")


async def empty(subject: Subject) -> Seen:
    """Empty completions: a model that ends at once."""
    answer = await subject.ask(["", " "], "empty completions")
    return _ok(f"empty completions earned {_words(answer.rewards)}")


async def unicode(subject: Subject) -> Seen:
    """Scripts, emoji, combining and control characters."""
    await subject.ask(UNICODE, "unicode completions")
    return _ok(f"{len(UNICODE)} completions of other scripts, emoji and control characters are answered")


async def isolation(subject: Subject) -> Seen:
    """What cannot be scored takes nothing from its neighbours."""
    good = ordinary(subject)
    alone = await subject.ask(good, "an ordinary group")
    odd = ["", "\x00", "x" * 100_000, "{" * 2000]
    mixed = [text for pair in zip(good, odd, strict=True) for text in pair]
    together = await subject.ask(mixed, "a group of ordinary and odd completions")
    lost = sum(was and not now for was, now in zip(alone.scored, together.scored[::2], strict=True))
    if lost:
        return _fail(
            f"{lost} completions that are scored alone are errors beside empty, long and malformed ones",
            "catch the failure of each rollout by itself, and answer `error` for that one only",
        )
    errors = together.scored[1::2].count(False)
    return _ok(f"odd completions ({errors} of {len(odd)} are errors) leave the others of their group alone")


async def repeats(subject: Subject) -> Seen:
    """The same group, three times: equal where the environment promises it, else measured."""
    texts = ordinary(subject)
    answers = [await subject.ask(texts, "the same group again") for _ in range(3)]
    spread = _spread(answers)
    if subject.environment.deterministic:
        if spread:
            return _fail(
                f"the same rollouts earned different rewards, by up to {spread:g}",
                "remove what is random or kept between calls, or say deterministic: false in ListEnvironments",
            )
        return _ok("the same rollouts earn the same rewards, as promised")
    where = "ListEnvironmentsResponse.environments[].deterministic"
    if spread:
        return _advice(
            f"rewards of the same rollouts differed by up to {spread:g}; the environment does not promise otherwise",
            "noise in a reward costs training steps: make it smaller where you can",
            where,
        )
    return _advice(
        "the same rollouts earned the same rewards three times, which the environment does not promise",
        "say deterministic: true if it is always so",
        where,
    )


async def position(subject: Subject) -> Seen:
    """The same group in another order: rewards go with the completions."""
    texts = ordinary(subject)
    forth = await subject.ask(texts, "an ordinary group")
    back = await subject.ask(texts[::-1], "the same group in another order")
    if not subject.environment.deterministic:
        return Seen(Verdict.SKIPPED, "the environment does not promise equal rewards")
    if _differ(forth.rewards, back.rewards[::-1]):
        return _fail(
            f"in another order the completions earned {_words(back.rewards[::-1])} in place of {_words(forth.rewards)}",
            "score by the completion alone, and give each result the rollout_id of what it is about",
        )
    return _ok("rewards go with the completions, in whatever order they are sent")


async def deadline(subject: Subject) -> Seen:
    """A time that hardly any reward keeps: what is late is an error, soon."""
    texts, limit = ordinary(subject), 0.001
    for _ in range(_TRIES):
        began = time.monotonic()
        answer = await subject.ask(texts, "a group with an item_timeout of 1 ms", item_timeout=limit)
        seconds = time.monotonic() - began
        if seconds <= limit * len(texts) + _SLACK:
            late, took = answer.scored.count(False), f"{seconds * 1000:.0f} ms"
            return _ok(f"with an item_timeout of 1 ms it answered in {took}, {late} of {len(texts)} errors")
    return _fail(
        f"with an item_timeout of 1 ms, {len(texts)} rollouts took {seconds:.1f} s",
        "answer `error` with the code DEADLINE_EXCEEDED for a rollout that takes longer than item_timeout",
        "ScoreRolloutsRequest.item_timeout",
    )


async def cancelled(subject: Subject) -> Seen:
    """Calls that their caller gives up: the service goes on."""
    texts = ordinary(subject)
    before = await subject.ask(texts, "an ordinary group")
    for seconds in _CANCELLED_AFTER:
        calls = [asyncio.ensure_future(subject.start(subject.request(texts * 16))) for _ in range(8)]
        await asyncio.sleep(seconds)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    number = 8 * len(_CANCELLED_AFTER)
    after = await subject.ask(texts, f"the group after {number} cancelled calls")
    if before.scored != after.scored:
        return _fail(
            f"after {number} cancelled calls other completions are scored than before",
            "free what a call holds (locks, workers, connections) when it is cancelled",
        )
    return _ok(f"after {number} cancelled calls it answers as before, in {after.seconds * 1000:.0f} ms")


async def concurrency(subject: Subject) -> Seen:
    """Groups at once, as a job sends them: none sees another's rollouts."""
    groups = [[f"{text} {number}" for text in ordinary(subject)] for number in range(_AT_ONCE)]
    alone = [await subject.ask(group, "one group alone") for group in groups[:4]]
    began = time.monotonic()
    together = await asyncio.gather(*(subject.ask(group, f"one of {_AT_ONCE} groups at once") for group in groups))
    seconds = time.monotonic() - began
    if subject.environment.deterministic:
        for one, other in zip(alone, together, strict=False):
            if _differ(one.rewards, other.rewards):
                return _fail(
                    f"beside {_AT_ONCE - 1} other groups, a group earned {_words(other.rewards)} in place of "
                    f"{_words(one.rewards)}",
                    "keep nothing that a call needs where other calls write (globals, fields of the servicer)",
                )
    one_alone = min(answer.seconds for answer in alone)
    if one_alone > 0.05 and seconds > _IN_TURN * one_alone * _AT_ONCE:
        return _advice(
            f"{_AT_ONCE} groups at once took {seconds:.1f} s, one after the other; one alone {one_alone:.2f} s",
            "score several groups at once (more threads or workers, asynchronous calls): jobs send up to 64",
        )
    return _ok(f"{_AT_ONCE} groups at once took {seconds:.2f} s; one alone {one_alone * 1000:.0f} ms")


async def large_group(subject: Subject) -> Seen:
    """A large group."""
    texts = [f"{text} {number}" for number in range(_LARGE_GROUP // 4) for text in ordinary(subject)]
    return await _large(subject, texts, f"a group of {_LARGE_GROUP}")


async def large_message(subject: Subject) -> Seen:
    """More bytes than gRPC takes by default: long completions in a large group."""
    text = "The quick brown fox jumps over the lazy dog. "
    texts = [text * (_LARGE_BYTES // 64 // len(text) + 1)] * 64
    return await _large(subject, texts, f"a group of {_LARGE_BYTES // 2**20} MiB of text")


async def _large(subject: Subject, texts: Sequence[str], call: str) -> Seen:
    try:
        answer = await subject.ask(texts, call)
    except DeadlineError:
        return _advice(
            f"{call} was not answered within {subject.call_timeout:g} s",
            "score the rollouts of a group at once, or keep rollouts_per_example small and env[].timeout long",
        )
    except InvalidInputError as error:
        if error.reason != "MESSAGE_TOO_LARGE":
            raise
        return _fail(
            f"{call} was refused: {error.message}",
            "raise the server's limit on received messages (grpc.max_receive_message_length) to 64 MiB",
        )
    return _ok(f"{call} took {answer.seconds:.2f} s")


CHECKS: dict[str, Check] = {
    "scores": scores,
    "single": single,
    "empty": empty,
    "unicode": unicode,
    "isolation": isolation,
    "repeats": repeats,
    "position": position,
    "deadline": deadline,
    "concurrency": concurrency,
    "large-group": large_group,
    "large-message": large_message,
    "cancelled": cancelled,
}
"""In the order in which they are made: without `scores` there are no others; what can upset a service comes last."""


async def run_check(name: str, subject: Subject) -> Finding:
    """One check; a call that fails is a failed check."""
    try:
        seen = await CHECKS[name](subject)
    except SurogateError as error:
        took = f" (after {subject.call_timeout:g} s)" if isinstance(error, DeadlineError) else ""
        seen = _fail(
            f"the call failed{took}: {error.reason}: {error.message}",
            "answer every rollout, with `error` for what cannot be scored: a failed call loses the whole group",
        )
    where = "" if seen.verdict in (Verdict.OK, Verdict.SKIPPED) else seen.where
    return Finding(name, seen.verdict, seen.what, where, seen.do, subject.environment.id)


def _differ(one: Sequence[Reward], other: Sequence[Reward]) -> bool:
    return any(_distance(a, b) for a, b in zip(one, other, strict=True))


def _spread(answers: Sequence[Answer]) -> float:
    """Largest difference between rewards of one rollout."""
    first, *others = answers
    return max(_distance(a, b) for answer in others for a, b in zip(first.rewards, answer.rewards, strict=True))


def _distance(one: Reward, other: Reward) -> float:
    """0 for equal outcomes, infinity for a score and an error; NaN equals NaN: another check tells of it."""
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    if math.isnan(one) or math.isnan(other):
        return 0.0 if math.isnan(one) and math.isnan(other) else math.inf
    return 0.0 if one == other else abs(one - other)


def _words(rewards: Sequence[Reward]) -> str:
    return ", ".join("an error" if reward is None else f"{reward:g}" for reward in rewards)
