"""`math`: answers that are mathematically equal to the dataset's, compared by the math-verify library."""

from __future__ import annotations

from pydantic import Field

from reward_svc.workers.pool import WorkerPool
from surogate.errors import DeadlineError, InternalError, InvalidInputError
from surogate.reward.prompts import DatasetArgs, DatasetEnvironment
from surogate.v1 import reward_pb2

MAX_CHARS = 50_000
"""Of a longer completion the end is read: that is where the answer is."""


class MathArgs(DatasetArgs):
    """Arguments of `math`."""

    digits: int = Field(6, ge=0, le=15)
    """Decimals after which numbers are rounded before they are compared."""
    answer_prefix: str | None = Field(None, min_length=1)
    """Read what follows the last occurrence of this in the completion (`####`); a completion without it is wrong."""
    boxed: bool = False
    """Only an answer in `\\boxed{}` counts; a completion without one is wrong."""
    timeout: float = Field(10.0, gt=0, le=600)
    """Seconds that one comparison may take. What takes longer is an error of that rollout, not a reward."""


class Math(DatasetEnvironment[MathArgs]):
    """Rewards 1 when the completion's answer equals `example.answer`, else 0; in processes that are killed if late."""

    id = "math"
    description = "Solve a problem. Reward: 1 when the answer (boxed, LaTeX or plain) equals the dataset's, else 0."
    args_model = MathArgs
    needs_answer = True

    def __init__(self, processes: int) -> None:
        self._pool = WorkerPool("reward_svc.workers.math_worker", processes)
        self.max_concurrent = processes

    async def score(self, args: MathArgs, example: reward_pb2.Example, rollout: reward_pb2.Rollout) -> reward_pb2.Score:
        """Compares in a worker. Raises InvalidInputError if the answer is no mathematics, DeadlineError if late."""
        text = rollout.completion[-MAX_CHARS:]
        if args.answer_prefix is not None:
            _, found, text = text.rpartition(args.answer_prefix)
            if not found:
                return reward_pb2.Score(reward=0.0, explanation=f"no {args.answer_prefix!r} in the completion")
        if args.boxed and "\\boxed" not in text:
            return reward_pb2.Score(reward=0.0, explanation="nothing boxed in the completion")
        if "\\boxed" in text:  # what is boxed is the answer, and of several the last
            text = text[text.rindex("\\boxed") :]
        request = {"answer": example.answer, "completion": text, "digits": args.digits}
        try:
            found_answer = await self._pool.ask(request, args.timeout)
        except DeadlineError as error:
            raise DeadlineError(f"comparing the answers took longer than timeout ({args.timeout:g} s)") from error
        except InternalError as error:
            raise InternalError(f"comparing the answers failed: {error}; was memory exhausted?") from error
        if not found_answer["readable"]:
            raise InvalidInputError(f"math cannot read the answer {example.answer[:100]!r}")
        read, right = found_answer["read"], found_answer["right"]
        explanation = "no answer in the completion" if read is None else f"read {read}, expected {example.answer}"
        return reward_pb2.Score(
            reward=float(right), components={"parsed": float(read is not None)}, explanation=explanation
        )

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()
