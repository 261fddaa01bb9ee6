"""Episodes of environments of the `verifiers` package, turn by turn: what its own loop does between two of the model's.

The package is imported when an environment of it is first asked for.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

from reward_svc.adapters.rubrics import watch
from surogate.errors import FailedPreconditionError, InternalError, InvalidInputError, Violation
from surogate.structs import from_struct
from surogate.v1 import common_pb2, reward_pb2

_MODEL = "policy"  # what environments are told that the model is called


def refused(key: str, why: str) -> InvalidInputError:
    """The error about an environment that the key `env[].<key>` names."""
    violation = Violation(f"env[].{key}", why)
    return InvalidInputError(str(violation), violations=[violation])


def load(environment_id: str, args: Mapping[str, Any], key: str) -> Any:
    """An environment by its id, which stands at `env[].<key>`.

    Raises:
        FailedPreconditionError: The package is not installed.
        InvalidInputError: There is no such environment, or it is of a kind that does not fit.
    """
    try:
        import verifiers as vf
    except ImportError as error:
        raise FailedPreconditionError(
            "the verifiers package is not installed where the reward service runs: pip install 'surogate[verifiers]'",
            reason="VERIFIERS_MISSING",
        ) from error
    if not hasattr(vf, "load_environment"):
        raise FailedPreconditionError(
            f"verifiers {version('verifiers')} is another library than 0.2 and 0.3 were, and has none of their "
            "environments: pip install 'surogate[verifiers]'",
            reason="VERIFIERS_VERSION",
        )
    _keep_signals(sys.modules[vf.Environment.__module__])
    try:
        environment = vf.load_environment(environment_id, **args)
    except Exception as error:  # somebody else's code
        raise refused(key, f"{environment_id} cannot be loaded: {error}") from error
    if not isinstance(environment, vf.MultiTurnEnv):
        kind = type(environment).__name__
        raise refused(key, f"{environment_id} is a {kind}, neither a SingleTurnEnv nor a MultiTurnEnv")
    if environment.tool_defs:
        raise refused(key, f"{environment_id} has the model call native tools, which is not supported")
    watch(environment.rubric)
    return environment


def _keep_signals(module: Any) -> None:
    """Keeps SIGINT and SIGTERM the service's: every environment would take them for itself, in main threads only."""
    module.signal = SimpleNamespace(**{**vars(signal), "signal": lambda *_: None})


async def begin(environment: Any, example: reward_pb2.Example) -> Any:
    """The object of a new episode."""
    import verifiers as vf

    prompt = [{"role": message.role, "content": message.content} for message in example.prompt]
    row = {**from_struct(example.fields), "prompt": prompt, "answer": example.answer}
    nobody: Any = vf.OpenAIChatCompletionsClient(None)  # the model is the orchestrator's to ask
    state = await environment.init_state(row, nobody, _MODEL)
    return await environment.setup_state(state) or state


async def respond(environment: Any, state: Any, completion: str) -> list[common_pb2.ChatMessage] | None:
    """What the environment says to the model's turn; None when the episode has ended."""
    _speak(state, completion)
    if await environment.is_completed(state):
        return None
    before = _conversation(state)
    after = _messages(await environment.get_prompt_messages(state))
    if state.get("final_env_response") is not None or await environment.is_completed(state):
        return None
    if [_text(item) for item in after[: len(before)]] != [_text(item) for item in before]:
        raise InternalError(
            "the environment rewrites what was said before, and tokens that were sampled stay as they are"
        )
    state["next_prompt"] = after
    return [common_pb2.ChatMessage(role=_text(item)[0], content=_text(item)[1]) for item in after[len(before) :]]


async def end(environment: Any, state: Any, last: str | None, *, truncated: bool) -> None:
    """Ends an episode, so that it can be scored; `last` is a turn that the environment was not shown."""
    if last is not None:
        _speak(state, last)
    state["is_truncated"] = truncated
    state["is_completed"] = True
    await environment.cleanup(state)


def _speak(state: Any, text: str) -> None:
    """Adds a turn of the model."""
    prompt = state.pop("next_prompt", None) or state["prompt"]
    step = {
        "prompt": prompt,
        "completion": _messages([{"role": "assistant", "content": text}]),
        "response": None,
        "tokens": None,
        "reward": None,
        "advantage": None,
        "is_truncated": False,
        "trajectory_id": state["trajectory_id"],
        "extras": {},
    }
    state["trajectory"].append(step)


def _conversation(state: Any) -> list[Any]:
    step = state["trajectory"][-1]
    return [*step["prompt"], *step["completion"]]


def _messages(messages: Any) -> list[Any]:
    from verifiers.utils.message_utils import maybe_normalize_messages

    found: list[Any] = maybe_normalize_messages(messages, field_name="messages")
    return found


def _text(message: Any) -> tuple[str, str]:
    """Role and text of a message. Raises InternalError for one with parts other than text."""
    content = message.content
    if isinstance(content, Sequence) and not isinstance(content, str):
        if any(getattr(part, "type", "") != "text" for part in content):
            raise InternalError("the environment says something other than text")
        content = "".join(part.text for part in content)
    return str(message.role), content or ""
