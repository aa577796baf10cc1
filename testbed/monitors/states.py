"""Drift of the hidden states: the last decoder layer's output at the last prompt position."""

from __future__ import annotations

import numpy as np

from testbed.core.registry import MONITORS
from testbed.monitors.base import Monitor, View, finite


@MONITORS.register("states")
class States(Monitor):
    """States h of the edited and h0 of the unedited model, over the prompts.

    hidden_cosine: mean cos(h, h0). hidden_shift: |mean h - mean h0| / sqrt(mean |h0|^2). activation_scale: mean
    |h| / mean |h0|. They are 1, 0 and 1 for an unedited model, and absent where no state is finite.
    """

    summary = "drift of the last layer's states from the unedited model's: cosine, shift of the centre, scale"

    def measure(self, view: View) -> dict[str, float]:
        now, base = finite(view)
        if not now:
            return {}
        h, h0 = (np.stack([x.hidden[-1] for x in side]).astype(np.float64) for side in (now, base))
        length, length0 = np.linalg.norm(h, axis=1), np.linalg.norm(h0, axis=1)
        cosine = (h * h0).sum(1) / np.maximum(length * length0, 1e-300)
        return {
            "hidden_cosine": float(cosine.mean()),
            "hidden_shift": float(np.linalg.norm(h.mean(0) - h0.mean(0)) / np.sqrt((length0**2).mean())),
            "activation_scale": float(length.mean() / length0.mean()),
        }
