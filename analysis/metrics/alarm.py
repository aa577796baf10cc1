"""An alarm that may be looked at after every checkpoint: has the model lost what no edit was about?

At checkpoint t questions are drawn afresh from a pool; X is 1 where the answer is that of the unedited model. While
the pool's mean under the model of that moment is at least m, whatever happened before,

    L_t(l) = prod_j (1 + l (m - X_tj)),  0 <= l < 1 / (1 - m),

has conditional mean at most 1. The e-detector M_t = L_t max(1, M_{t-1}), averaged over a few l, is under
R_t = L_t (1 + R_{t-1}), and R_t - t is a supermartingale, so P(M reaches c within n checkpoints) <= n / c.
Source: e-detectors, Shin, Ramdas and Rinaldo 2023; betting, Waudby-Smith and Ramdas 2024. Draws without
replacement, or of two kinds in fixed numbers, keep the bound (negative association; the mean of logarithms).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.metrics.bootstrap import Interval
from analysis.reading.load import EditorRun
from analysis.reading.records import FRESH

TOLERATED = 0.10
"""Share of unrelated answers that may change before it counts as damage."""
EVIDENCE = 1000.0
"""The alarm rings when the e-detector reaches this: within n checkpoints a false alarm has chance n / EVIDENCE at most."""
BETS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""How much is bet on the mean being lower, averaged over; all under 1 / (1 - m) for the tolerated loss above."""


@dataclass(frozen=True)
class Alarm:
    """The detector's path: steps, share of answers kept and evidence, one entry a checkpoint.

    rang: index of the checkpoint at which the alarm rang, or None. since: index of the last checkpoint at which the
    evidence stood at or under 1, so the loss began after it (-1: from the first checkpoint on).
    """

    steps: np.ndarray
    kept: np.ndarray
    evidence: np.ndarray
    rang: int | None
    since: int

    @property
    def false_alarm(self) -> float:
        """Upper bound on the chance of a false alarm within the checkpoints of this run."""
        return min(1.0, len(self.steps) / EVIDENCE)


def watch(editor: EditorRun) -> Alarm | None:
    """The alarm over an editor's run; None where nothing was drawn afresh."""
    rows = editor.records[editor.records["role"] == FRESH]
    agreed = rows["gen"].where(rows["gen"].notna(), rows["tf_exact"])
    rows = pd.DataFrame({"step": rows["step"], "x": agreed}).dropna()
    if rows.empty:
        return None
    sums = rows.groupby("step")["x"].agg(["sum", "size"])
    return detect(sums.index.to_numpy(), sums["sum"].to_numpy(), sums["size"].to_numpy())


def detect(steps: np.ndarray, kept: np.ndarray, asked: np.ndarray, least: float = 1 - TOLERATED) -> Alarm:
    """The e-detector on counts of kept answers among those asked, one entry a checkpoint."""
    bets = np.array(BETS)
    gain = np.outer(kept, np.log1p(bets * (least - 1))) + np.outer(asked - kept, np.log1p(bets * least))
    log, total = np.zeros(len(bets)), []
    for step in gain:
        log = step + np.maximum(0.0, log)
        total.append(np.logaddexp.reduce(log) - np.log(len(bets)))
    evidence = np.array(total)
    over = np.flatnonzero(evidence >= np.log(EVIDENCE))
    rang = int(over[0]) if len(over) else None
    calm = np.flatnonzero(evidence[: len(evidence) if rang is None else rang] <= 0)
    return Alarm(steps, kept / asked, np.exp(np.minimum(evidence, 700.0)), rang, int(calm[-1]) if len(calm) else -1)


def alarm_step(editor: EditorRun) -> dict[str, Interval]:
    """{"alarm_step": ...} or nothing: the checkpoint at which the alarm rang; `low` is the one after which the loss
    began by the detector's own account, `n` the number of checkpoints."""
    found = watch(editor)
    if found is None or found.rang is None:
        return {}
    rang, since = float(found.steps[found.rang]), found.since
    return {"alarm_step": {"value": rang, "low": float(found.steps[since]) if since >= 0 else 0.0, "high": rang, "n": len(found.steps)}}
