"""A reward of a microsecond on the SDK: what is left is the service's time."""

from __future__ import annotations

from surogate.reward import reward, serve


@reward("quick")
def quick(completion: str, answer: str) -> float:
    """Whether the answer is in the completion."""
    return float(answer in completion)


if __name__ == "__main__":
    serve(quick)
