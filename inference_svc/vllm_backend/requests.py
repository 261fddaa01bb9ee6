"""The contract's sampling parameters as vLLM's, and vLLM's outputs as the contract's completions."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from surogate.v1 import common_pb2, inference_pb2

FINISH = {
    "stop": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
}
"""Any other reason that vLLM gives (abort, error) is ABORTED."""


def sampling_params(
    sampling: common_pb2.SamplingParams, room: int, *, n: int = 1, stream: bool = False
) -> SamplingParams:
    """vLLM's parameters for a checked request; `room` is the number of tokens that still fit the context."""

    def given(name: str, default: Any) -> Any:
        return getattr(sampling, name) if sampling.HasField(name) else default  # type: ignore[arg-type]

    top_k = given("top_k", 0)
    return SamplingParams(
        n=n,
        temperature=given("temperature", 1.0),
        max_tokens=min(given("max_tokens", room), room),
        min_tokens=given("min_tokens", 0),
        top_p=given("top_p", 1.0),
        top_k=max(top_k, 0),
        repetition_penalty=given("repetition_penalty", 1.0),
        seed=given("seed", None),
        stop=list(sampling.stop) or None,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        logprobs=None if stream else 0,
        flat_logprobs=not stream,
        detokenize=stream or bool(sampling.stop),
        skip_special_tokens=True,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
    )


def scoring_params(last: int, temperature: float) -> SamplingParams:
    """Parameters that score a prompt at `temperature`, and `last` as the token after it."""
    return SamplingParams(
        max_tokens=1,
        temperature=temperature,
        prompt_logprobs=0,
        logprobs=1,
        logprob_token_ids=[last],
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def completion(output: Any) -> inference_pb2.Completion:
    """One of vLLM's finished outputs (CompletionOutput) as a completion."""
    return inference_pb2.Completion(
        token_ids=output.token_ids,
        logprobs=output.logprobs.logprobs if output.logprobs else (),
        finish_reason=FINISH.get(output.finish_reason, common_pb2.FINISH_REASON_ABORTED),
        policy_spans=[
            common_pb2.PolicySpan(policy_version=int(span.version), num_tokens=span.end - span.start)
            for span in output.weight_versions or ()
            if span.end > span.start
        ],
    )
