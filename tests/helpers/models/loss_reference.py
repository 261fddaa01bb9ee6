"""The losses once more, from their formulas, in plain Python and float64: what the tests of the losses trust.

`loss(config, tokens, ...)` takes one dict a token. A stop-gradient is written as a second set of trainer logprobs:
`p` is what a gradient flows into, `p0` the same numbers as constants. `gradient` differentiates by central differences
in `p` with `p0` held.
"""

from __future__ import annotations

import math
from typing import Any

Token = dict[str, Any]
"""p, q, a, m, s (sample id), and, where needed, old, ref, teacher."""


def loss(config: Any, tokens: list[Token], p: list[float] | None = None, **totals: Any) -> float:
    """The loss; `p` replaces the differentiable trainer logprobs. totals: num_tokens, num_samples, max_length."""
    ps = [t["p"] for t in tokens] if p is None else p
    rows = [{**t, "p0": t["p"], "p": value} for t, value in zip(tokens, ps, strict=True)]
    samples: dict[Any, list[Token]] = {}
    for row in rows:
        samples.setdefault(row["s"], []).append(row)
    trained = {s: [t for t in ts if t["m"]] for s, ts in samples.items()}
    big_n = max(totals.get("num_tokens") or sum(map(len, trained.values())), 1)
    big_b = max(totals.get("num_samples") or len(samples), 1)
    longest = totals.get("max_length") or max(map(len, trained.values()), default=1)
    if config.type == "ipo":
        return _ipo(config, trained) / big_n
    if config.type == "dppo":
        return _dppo(config, trained) / big_n
    if config.type == "aipo":
        return _aipo(config, trained, big_n, big_b)
    return _clip(config, trained, big_n, big_b, max(longest, 1))


def gradient(config: Any, tokens: list[Token], h: float = 1e-6, **totals: Any) -> list[float]:
    """d loss / d p for every token."""
    base = [t["p"] for t in tokens]
    out = []
    for i in range(len(tokens)):
        up, down = list(base), list(base)
        up[i] += h
        down[i] -= h
        out.append((loss(config, tokens, up, **totals) - loss(config, tokens, down, **totals)) / (2 * h))
    return out


def _ipo(c: Any, samples: dict[Any, list[Token]]) -> float:
    total = 0.0
    for t in (t for ts in samples.values() for t in ts):
        delta = math.exp(t["p0"]) - math.exp(t["q"])
        total += c.kl_tau * (t["p"] - t["q"]) ** 2
        if -c.ipo_mask_low <= delta <= c.ipo_mask_high:
            signal = c.adv_tau * t["a"]
            if c.teacher_tau:
                signal += c.teacher_tau * (t["teacher"] - t["p0"])
            total -= signal * min(math.exp(t["p0"] - t["q"]), c.ratio_clip) * t["p"]
    return total


def _dppo(c: Any, samples: dict[Any, list[Token]]) -> float:
    total = 0.0
    for t in (t for ts in samples.values() for t in ts):
        delta = math.exp(t["p0"]) - math.exp(t["q"])
        total += c.kl_tau * (t["p"] - t["q"]) ** 2
        gone = delta > c.ipo_mask_high if t["a"] > 0 else delta < -c.ipo_mask_low
        if not gone:
            total -= c.adv_tau * t["a"] * math.exp(t["p"] - t["q"])
    return total


def _aipo(c: Any, samples: dict[Any, list[Token]], big_n: float, big_b: float) -> float:
    total = 0.0
    for ts in samples.values():
        n = max(len(ts), 1)
        logs = [t["p0"] - t["q"] for t in ts]
        geo = math.exp(sum(logs) / n)
        seq = min(math.exp(min(sum(logs), 10)), c.sequence_clip_high)
        whole = c.geo_mask_low <= geo <= c.geo_mask_high
        whole = whole and all(c.sequence_mask_low <= math.exp(x) <= c.sequence_mask_high for x in logs)
        inner = 0.0
        for t, x in zip(ts, logs, strict=True):
            r = math.exp(x)
            if not whole or r < c.token_mask_low or r > c.token_mask_high:
                continue
            signal = c.adv_tau * t["a"] - c.kl_tau * x
            if c.teacher_tau:
                signal += c.teacher_tau * (t["teacher"] - t["p0"])
            inner += (r if c.ratio_type == "token" else seq) * signal * t["p"]
        total -= inner / big_n if c.ratio_type == "token" else inner / n / big_b
    return total


def _clip(c: Any, samples: dict[Any, list[Token]], big_n: float, big_b: float, longest: float) -> float:
    total = 0.0
    for ts in samples.values():
        n = max(len(ts), 1)
        old = [t.get("old", t["p0"]) for t in ts]
        changes = [t["p"] - o for t, o in zip(ts, old, strict=True)]
        frozen = [t["p0"] - o for t, o in zip(ts, old, strict=True)]
        gaps = [o - t["q"] for t, o in zip(ts, old, strict=True)]
        inner = 0.0
        for t, change, constant, gap in zip(ts, changes, frozen, gaps, strict=True):
            ratio = math.exp(sum(changes) / n if c.type == "gspo" else change)
            if c.type == "cispo":
                term = -min(math.exp(constant), c.epsilon_high) * t["a"] * t["p"]
            else:
                clipped = min(max(ratio, 1 - c.epsilon_low), 1 + c.epsilon_high)
                term = -min(ratio * t["a"], clipped * t["a"])
            if c.beta:
                d = t["ref"] - t["p"]
                term += c.beta * (math.exp(d) - d - 1)
            inner += term * _rho(c, sum(gaps) if c.sampler_correction.startswith("sequence") else gap)
        if c.type in ("grpo", "gspo"):
            total += inner / n / big_b
        elif c.type == "dr_grpo":
            total += inner / (big_b * longest)
        else:
            total += inner / big_n
    return total


def _rho(c: Any, log_rho: float) -> float:
    if c.sampler_correction == "none":
        return 1.0
    rho = math.exp(log_rho)
    if rho <= c.sampler_correction_cap:
        return rho
    return 0.0 if c.sampler_correction.endswith("mask") else c.sampler_correction_cap
