"""Episodes: conversations in which an environment answers the model's turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.protobuf.struct_pb2 import Struct

from surogate.errors import InternalError, InvalidInputError
from surogate.structs import from_struct, to_struct
from surogate.v1 import common_pb2, reward_pb2

Answer: TypeAlias = "str | common_pb2.ChatMessage | Sequence[common_pb2.ChatMessage] | None"
"""What an environment says: a text (role `user`), a message, several, or None to end the episode."""


@dataclass
class Episode:
    """An episode in which the model has just spoken."""

    rollout_id: str
    """Id, unique in the run."""
    turn: int
    """Number of the model's turn, from 1."""
    messages: list[common_pb2.ChatMessage]
    """What was said after the prompt; the model's turn is the last."""
    state: dict[str, Any]
    """What the environment remembers: JSON values that it leaves here are there at the next turn, and for scoring."""

    @property
    def completion(self) -> str:
        """The model's turn, special tokens removed."""
        return self.messages[-1].content


def episode_of(request: reward_pb2.TakeTurnRequest) -> Episode:
    """The episode that a call is about. Raises InvalidInputError if its last message is not the model's."""
    if not request.messages or request.messages[-1].role != "assistant":
        raise InvalidInputError("the last of `messages` must be the model's turn, of role assistant")
    return Episode(request.rollout_id, request.turn, list(request.messages), from_struct(request.state))


def answer_message(answer: object, episode: Episode) -> reward_pb2.TakeTurnResponse:
    """What an environment answered, as it travels. Raises InternalError for what is no answer."""
    match answer:
        case None:
            messages = []
        case str():
            messages = [common_pb2.ChatMessage(role="user", content=answer)]
        case common_pb2.ChatMessage():
            messages = [answer]
        case Sequence() if answer and all(isinstance(item, common_pb2.ChatMessage) for item in answer):
            messages = list(answer)
        case _:
            raise InternalError(f"a turn was answered with {answer!r}, which is neither a text nor messages nor None")
    return reward_pb2.TakeTurnResponse(messages=messages, state=_state(episode))


def _state(episode: Episode) -> Struct:
    try:
        return to_struct(episode.state)
    except InvalidInputError as error:
        raise InternalError("the state of an episode must be a dict of JSON values") from error
