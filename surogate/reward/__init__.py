"""SDK for rewards and environments: write one in Python, and serve it.

    from surogate.reward import reward, serve

    @reward("vowels", min_reward=0, max_reward=1)
    def vowels(completion: str) -> float:
        \"\"\"Share of vowels among the letters.\"\"\"
        letters = [char for char in completion.lower() if char.isalpha()]
        return sum(char in "aeiou" for char in letters) / len(letters)

    if __name__ == "__main__":
        serve(vowels)

`Example`, `Rollout` and `Score` are the messages of the contract (`surogate.v1.reward_pb2`). An environment that an
installed package names as an entry point of the group `surogate.environments` is there in the built-in service too.
"""

from surogate.reward.arguments import bad_argument
from surogate.reward.base import Environment, EnvironmentArgs, Split
from surogate.reward.episode import Answer, Episode
from surogate.reward.functions import group_reward, reward
from surogate.reward.prompts import DatasetArgs, DatasetEnvironment
from surogate.reward.serve import serve
from surogate.reward.splits import draw_unique, rng_for
from surogate.v1.common_pb2 import ChatMessage
from surogate.v1.reward_pb2 import Example, Rollout, Score

__all__ = [
    "Answer",
    "ChatMessage",
    "DatasetArgs",
    "DatasetEnvironment",
    "Environment",
    "EnvironmentArgs",
    "Episode",
    "Example",
    "Rollout",
    "Score",
    "Split",
    "bad_argument",
    "draw_unique",
    "group_reward",
    "reward",
    "rng_for",
    "serve",
]
