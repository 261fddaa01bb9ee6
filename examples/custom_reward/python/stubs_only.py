"""A reward service of one's own, on nothing but the generated stubs and grpcio: rewards completions for their vowels.

python stubs_only.py [HOST:PORT]
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

from surogate.v1 import reward_pb2, reward_pb2_grpc

ENVIRONMENT = "vowels"


def score(text: str) -> float:
    """Share of vowels among the letters. Raises ValueError for a text without letters: that has no share."""
    letters = [char for char in text if char.isalpha()]
    if not letters:
        raise ValueError("no letters in the completion")
    return sum(char in "aeiouAEIOU" for char in letters) / len(letters)


class VowelReward(reward_pb2_grpc.RewardServiceServicer):
    """The two methods that a reward service must have."""

    def ListEnvironments(self, request, context):
        environment = reward_pb2.Environment(
            id=ENVIRONMENT, description="Share of vowels.", min_reward=0, max_reward=1, deterministic=True, version="1"
        )
        return reward_pb2.ListEnvironmentsResponse(environments=[environment])

    def ScoreRollouts(self, request, context):
        if request.environment != ENVIRONMENT:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no environment {request.environment!r}; there is {ENVIRONMENT}")
        results = []
        for rollout in request.rollouts:  # every rollout is answered, in order
            result = reward_pb2.RolloutResult(rollout_id=rollout.rollout_id)
            try:
                result.score.reward = score(rollout.completion)
            except ValueError as error:  # what cannot be scored is an error, never a reward of 0
                result.error.code, result.error.message = grpc.StatusCode.INVALID_ARGUMENT.value[0], str(error)
            results.append(result)
        return reward_pb2.ScoreRolloutsResponse(results=results)


if __name__ == "__main__":
    options = [("grpc.max_receive_message_length", 64 * 2**20)]  # gRPC's 4 MiB are too little for large groups
    server = grpc.server(ThreadPoolExecutor(max_workers=8), options=options)
    reward_pb2_grpc.add_RewardServiceServicer_to_server(VowelReward(), server)
    port = server.add_insecure_port(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50080")
    server.start()
    print(f"listening on port {port}", flush=True)
    server.wait_for_termination()
