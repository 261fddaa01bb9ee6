"""A reward service on the SDK: rewards completions for their vowels.

python server.py --listen 127.0.0.1:50080
"""

from surogate.reward import reward, serve


@reward("vowels", min_reward=0, max_reward=1)
def vowels(completion: str) -> float:
    """Share of vowels among the letters."""
    letters = [char for char in completion if char.isalpha()]
    if not letters:  # an exception is an error of this rollout, never a reward of 0
        raise ValueError("no letters in the completion")
    return sum(char in "aeiouAEIOU" for char in letters) / len(letters)


if __name__ == "__main__":
    serve(vowels)
