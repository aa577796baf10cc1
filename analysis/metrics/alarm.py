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

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.metrics.bootstrap import Interval, never_within
from analysis.reading.load import EditorRun
from analysis.reading.records import FRESH

TOLERATED = 0.10
"""Share of unrelated answers that may change before it counts as damage."""
EVIDENCE = 1000.0
"""The e-detector raises the alarm at this value: within n checkpoints a false alarm has a probability of at most n / EVIDENCE."""
FALL = 0.80
"""Share of kept answers after the fall for which the alarm's power is stated."""
BETS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The values of l over which the e-detector is averaged; all are under 1 / (1 - m) for the tolerated loss above."""


@dataclass(frozen=True)
class Alarm:
    """The detector's path: steps, questions asked and evidence, one entry for each checkpoint.

    raised: index of the checkpoint at which the alarm was raised, or None. calm: index of the last checkpoint before that
    at which the evidence was 1 or less, so that the loss began after it (-1: the loss began before the first checkpoint).
    """

    steps: np.ndarray
    questions: np.ndarray
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
    return alarm_of(rows.assign(agreed=agreed), "agreed")


def alarm_of(rows: pd.DataFrame, column: str) -> Alarm | None:
    """The alarm over answers with a column that is 1 where an answer was kept, else 0 (nan: not measured); None without any."""
    rows = rows[["step", column]].dropna()
    if rows.empty:
        return None
    sums = rows.groupby("step")[column].agg(["sum", "size"])
    return detect(sums.index.to_numpy(), sums["sum"].to_numpy(), sums["size"].to_numpy())


def detect(steps: np.ndarray, kept: np.ndarray, questions: np.ndarray, least: float = 1 - TOLERATED) -> Alarm:
    """The e-detector on the number of kept answers and of questions at each checkpoint; least: the mean m."""
    evidence = log_evidence(kept, questions, least)
    over = np.flatnonzero(evidence >= np.log(EVIDENCE))
    raised = int(over[0]) if len(over) else None
    calm = np.flatnonzero(evidence[: len(evidence) if raised is None else raised] <= 0)
    return Alarm(steps, questions, np.exp(np.minimum(evidence, 700.0)), raised, int(calm[-1]) if len(calm) else -1)


def log_evidence(kept: np.ndarray, questions: np.ndarray, least: float = 1 - TOLERATED) -> np.ndarray:
    """Logarithm of the evidence after each checkpoint (the first axis); further axes of `kept` are runs of their own."""
    bets = np.array(BETS)
    lost = (questions - kept.T).T
    log, total = np.zeros((*kept.shape[1:], len(bets))), []
    for k, n in zip(kept, lost):
        log = np.multiply.outer(k, np.log1p(bets * (least - 1))) + np.multiply.outer(n, np.log1p(bets * least)) + np.maximum(0.0, log)
        total.append(np.logaddexp.reduce(log, axis=-1) - np.log(len(bets)))
    return np.array(total)


def power(questions: np.ndarray, share: float = FALL, runs: int = 2000) -> float:
    """Chance, by simulation, that the alarm is raised where only a share of the answers is kept from the first checkpoint on.

    questions: number of questions at each checkpoint of the run.
    """
    kept = np.random.default_rng(0).binomial(questions, share, (runs, len(questions))).T
    return float((log_evidence(kept, questions) >= np.log(EVIDENCE)).any(axis=0).mean())


def alarm_promise(editors: Iterable[EditorRun], others: Iterable[Alarm] = ()) -> dict[str, float]:
    """What the alarms of a run promise together; empty where no editor was watched.

    others: further alarms that may be raised in the run. false_alarm_at_most: bound on the probability that any is raised although
    nothing was lost. power: chance that one over unrelated questions sees a fall to a share `fall`, with the questions (median of its
    checkpoints) of the editor that was asked fewest.
    """
    alarms = [a for a in map(run_alarm, editors) if a is not None]
    if not alarms:
        return {}
    weakest = min(alarms, key=lambda a: a.questions.sum())
    false = min(1.0, sum(a.false_alarm for a in (*alarms, *others)))
    out = {"false_alarm_at_most": false, "evidence": EVIDENCE, "fall": FALL}
    return out | {"questions": float(np.median(weakest.questions)), "checkpoints": len(weakest.steps), "power": power(weakest.questions)}


def alarm_step(editor: EditorRun) -> dict[str, Interval]:
    """{"alarm_step": ...} with the checkpoint at which the alarm was raised, None where it was not; empty without fresh questions."""
    alarm = run_alarm(editor)
    return {} if alarm is None else {"alarm_step": alarm_point(alarm)}


def alarm_point(alarm: Alarm) -> Interval:
    """The checkpoint at which an alarm was raised, None where it was not.

    `low` is the checkpoint after which the loss began by the detector's estimate, `n` the number of checkpoints.
    """
    if alarm.raised is None:
        return never_within(len(alarm.steps))
    step, low = float(alarm.steps[alarm.raised]), float(alarm.steps[alarm.calm]) if alarm.calm >= 0 else 0.0
    return {"value": step, "low": low, "high": step, "n": len(alarm.steps)}
