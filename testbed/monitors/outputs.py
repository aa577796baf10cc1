"""The next token's distribution: its entropy, and its divergence from the unedited model's."""

from __future__ import annotations

import numpy as np

from testbed.core.registry import MONITORS
from testbed.monitors.base import Monitor, View, finite

TINY = 1e-12
"""Least remaining mass, because below it rounding would decide."""


@MONITORS.register("outputs")
class Outputs(Monitor):
    """Means over the prompts, of the next token's distribution at the last prompt position.

    entropy: in nats. kl_base: KL(unedited || edited) in nats, over the unedited model's likeliest tokens and the
    remaining mass as one outcome; by the data-processing inequality a lower bound of the whole divergence.
    non_finite: share of prompts whose prediction or state is not finite; the other two numbers leave these prompts
    out, and are absent where none is left.
    """

    summary = "entropy of the next token, its divergence from the unedited model's, predictions that are not finite"

    def measure(self, view: View) -> dict[str, float]:
        now, base = finite(view)
        out = {"non_finite": 1 - len(now) / len(view.now)}
        if now:
            out["entropy"] = float(np.mean([x.entropy for x in now]))
            out["kl_base"] = float(np.mean([divergence(b.logprobs, a.logprobs) for a, b in zip(now, base)]))
        return out


def divergence(base: np.ndarray, now: np.ndarray) -> float:
    """KL in nats between two distributions, given the log-probabilities (k,) of the same tokens under each."""
    rest, rest_now = (max(TINY, 1 - float(np.exp(x).sum())) for x in (base, now))
    p = np.exp(base)
    seen = p > 0
    kl = (p[seen] * (base[seen] - now[seen])).sum() + rest * np.log(rest / rest_now)
    return max(0.0, float(kl))
