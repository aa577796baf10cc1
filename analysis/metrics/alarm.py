"""A sequential test, valid after every checkpoint, of whether the model lost answers unrelated to any edit.

At checkpoint t questions are drawn afresh from a pool; X is 1 where the answer is that of the unedited model. While
the pool's mean under the model of that checkpoint is at least m, whatever happened before,

    L_t(l) = prod_j (1 + l (m - X_tj)),  0 <= l < 1 / (1 - m),

has conditional mean at most 1. The e-detector M_t = L_t max(1, M_{t-1}), averaged over a few l, is under
R_t = L_t (1 + R_{t-1}), and R_t - t is a supermartingale, so P(M reaches c within n checkpoints) <= n / c.
Sources: e-detectors, Shin, Ramdas and Rinaldo 2023; betting, Waudby-Smith and Ramdas 2024. Draws without
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
"""The e-detector raises the alarm at this value: within n checkpoints a false alarm has a probability of at most n / EVIDENCE."""
BETS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The values of l over which the e-detector is averaged; all are under 1 / (1 - m) for the tolerated loss above."""


@dataclass(frozen=True)
class Alarm:
    """The detector's path: steps and evidence, one entry for each checkpoint.

    raised: index of the checkpoint at which the alarm was raised, or None. calm: index of the last checkpoint before that
    at which the evidence was 1 or less, so that the loss began after it (-1: the loss began before the first checkpoint).
    """

    steps: np.ndarray
    evidence: np.ndarray
    raised: int | None
    calm: int

    @property
    def false_alarm(self) -> float:
        """Upper bound on the probability of a false alarm within the checkpoints of this run."""
        return min(1.0, len(self.steps) / EVIDENCE)


def run_alarm(editor: EditorRun) -> Alarm | None:
    """The alarm over an editor's run; None where no questions were drawn afresh."""
    rows = editor.records[editor.records["role"] == FRESH]
    agreed = rows["gen"].where(rows["gen"].notna(), rows["tf_exact"])
    rows = pd.DataFrame({"step": rows["step"], "x": agreed}).dropna()
    if rows.empty:
        return None
    sums = rows.groupby("step")["x"].agg(["sum", "size"])
    return detect(sums.index.to_numpy(), sums["sum"].to_numpy(), sums["size"].to_numpy())


def detect(steps: np.ndarray, kept: np.ndarray, questions: np.ndarray, least: float = 1 - TOLERATED) -> Alarm:
    """The e-detector on the number of kept answers and of questions at each checkpoint; least: the mean m."""
    bets = np.array(BETS)
    gain = np.outer(kept, np.log1p(bets * (least - 1))) + np.outer(questions - kept, np.log1p(bets * least))
    log, total = np.zeros(len(bets)), []
    for step in gain:
        log = step + np.maximum(0.0, log)
        total.append(np.logaddexp.reduce(log) - np.log(len(bets)))
    evidence = np.array(total)
    over = np.flatnonzero(evidence >= np.log(EVIDENCE))
    raised = int(over[0]) if len(over) else None
    calm = np.flatnonzero(evidence[: len(evidence) if raised is None else raised] <= 0)
    return Alarm(steps, np.exp(np.minimum(evidence, 700.0)), raised, int(calm[-1]) if len(calm) else -1)


def alarm_step(editor: EditorRun) -> dict[str, Interval]:
    """{"alarm_step": ...} with the checkpoint at which the alarm was raised; empty where it was not.

    `low` is the checkpoint after which the loss began by the detector's estimate, `n` the number of checkpoints.
    """
    alarm = run_alarm(editor)
    if alarm is None or alarm.raised is None:
        return {}
    step, low = float(alarm.steps[alarm.raised]), float(alarm.steps[alarm.calm]) if alarm.calm >= 0 else 0.0
    return {"alarm_step": {"value": step, "low": low, "high": step, "n": len(alarm.steps)}}
