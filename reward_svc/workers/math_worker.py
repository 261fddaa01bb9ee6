"""`python -m reward_svc.workers.math_worker`: compares answers with math-verify.

There are no timeouts in here: math-verify's own turn a comparison that takes too long into "not equal". The parent
kills this process instead, and knows why.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from reward_svc.workers.serve import serve

_NORMALISED = NormalizationConfig(
    basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="last", equations=False
)
# What is boxed comes before whatever else looks like an answer.
_LATEX = LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMALISED)
_PLAIN = ExprExtractionConfig()


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """`{answer, completion, digits}` → whether the answer is mathematics, what was read, whether it is equal."""
    gold = _gold(request["answer"])
    if not gold:
        return {"readable": False}
    given = parse(request["completion"], [_LATEX, _PLAIN], parsing_timeout=None)
    right = bool(given) and verify(
        list(gold), given, float_rounding=request["digits"], timeout_seconds=None, raise_on_error=False
    )
    return {"readable": True, "read": str(given[-1])[:200] if given else None, "right": bool(right)}


@lru_cache(maxsize=256)
def _gold(answer: str) -> tuple[Any, ...]:
    """Readings of the right answer, as written and as LaTeX: a dataset has `\\frac12` as well as `$\\frac12$`."""
    written = parse(answer, [_LATEX, _PLAIN], fallback_mode="no_fallback", parsing_timeout=None)
    latex = [] if "$" in answer else parse(f"${answer}$", [_LATEX], fallback_mode="no_fallback", parsing_timeout=None)
    return (*written, *latex)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    serve(compare)
