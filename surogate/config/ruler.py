"""The block of orch.yaml for rewards from a judge."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from surogate.config.base import ConfigModel, Count, Float, NonNegative, Positive, Size, Text, problem, refuse
from surogate.config.types import API_KEY_VARIABLE, JudgeUrl


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class JudgeConfig(ConfigModel):
    """Where the judge is."""

    block: ClassVar[str] = "ruler.judge."

    base_url: Annotated[list[JudgeUrl], BeforeValidator(_as_list)] = Field([])
    """`https://…/v1` of an endpoint that speaks OpenAI's chat completions, or `grpc://HOST:PORT` of an inference
    service of ours (`grpcs` with TLS); several share the requests.
    """
    api_key_var: Annotated[str, Field(pattern=API_KEY_VARIABLE)] = "RULER_JUDGE_API_KEY"
    """Environment variable of the reward service that holds the key; its name ends in _API_KEY. Where it is not set no
    key is sent.
    """
    timeout: Positive = 120.0
    """Longest time for a request and its repeats, in seconds, > 0, where `request_timeout` is not set."""
    max_retries: Annotated[Count, Field(le=20)] = 4
    """Repeats of a request that failed, with growing pauses, 0 to 20."""


class CostConfig(ConfigModel):
    """What the judge's tokens cost, in any currency; with prices the metric `reward/judge.cost` is there."""

    block: ClassVar[str] = "ruler.cost."

    input_per_million: NonNegative | None = None
    """Price of a million tokens that the judge is given, ≥ 0. null = not counted."""
    output_per_million: NonNegative | None = None
    """Price of a million tokens that it makes, ≥ 0. null = not counted."""


class RulerConfig(ConfigModel):
    """A judge model compares the rollouts of a group with each other: each gets a score from 0 to 1."""

    block: ClassVar[str] = "ruler."

    enabled: bool = False
    """Whether a judge is asked about the rollouts that are trained on; evaluations keep their environments' rewards."""
    mode: Literal["replace", "add", "metric"] = "replace"
    """What its score does: `replace` the environment's reward, `add` to it, or only show as the metric
    `reward/judge`.
    """
    judge_model: Text | None = None
    """Model that judges; not needed for grpc."""
    judge: JudgeConfig = JudgeConfig()
    """Where it is."""
    rubric: Text | None = None
    """What makes an answer good. null = right and complete before clear and short."""
    weight: Float = 1.0
    """Factor of its score, in the modes `replace` and `add`."""
    max_concurrent_judges: Annotated[Size, Field(le=1024)] = 32
    """Groups that are judged at once, 1 to 1024."""
    request_timeout: Annotated[Positive | None, Field(le=3600)] = None
    """Longest time for a request and its repeats, in seconds, > 0. null = judge.timeout."""
    max_retries_on_parse_error: Annotated[Count, Field(le=10)] = 2
    """Times that the judge is asked again when its answer cannot be read, 0 to 10."""
    swallow_exceptions: bool = True
    """What happens to a group whose judge failed. true = it is dropped and counted (`replace`), or keeps its
    environment's rewards (`add`, `metric`). false = the job fails. It is never a score of 0.
    """
    sampling: dict[str, Any] = Field({})
    """temperature, max_tokens and so on of the judge's requests."""
    extra_body: dict[str, Any] = Field({})
    """Further fields of the judge's requests."""
    cost: CostConfig = CostConfig()
    """Prices."""

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if not self.enabled:
            return self
        found = []
        if not self.judge.base_url:
            found.append(problem(("judge", "base_url"), "is needed: where does the judge run?"))
        if self.judge_model is None and any(url.startswith("http") for url in self.judge.base_url):
            found.append(problem("judge_model", "is needed: which model of the endpoint judges?"))
        refuse("ruler", found)
        return self
