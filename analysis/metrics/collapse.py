"""Collapse of a model, and the single edits that break it.

A model collapses by its perplexity on running text or by its retention of edits. Hard edits (Yang et al. 2024: one edit may
raise perplexity without bound; HardCF, HardEdit) are found by either of two criteria: the edit's step is the only one
between the last intact checkpoint and the first collapsed one, or its change of weights is many times the usual size.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from analysis.metrics.ability import text_answers
from analysis.metrics.bootstrap import Interval, never_within, point
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import AFTER, PANEL

LOG_PERPLEXITY = float(np.log(2))
"""A rise of the log-perplexity above this (nats a token) marks a checkpoint."""
RETAINED = 0.2
"""A gain under this share of the gain right after the edit marks a checkpoint."""
LEAST_GAIN = 0.1
"""Retention counts only for an editor whose edits raised token accuracy by at least this much right after the edit."""
LEAST_EDITS = 5
"""Fewest edits in a checkpoint's panel for which its retention counts."""


def collapse(run: Run, editor: EditorRun) -> dict[str, Interval]:
    """`collapse_step` and `collapse_edits`: the first step that starts two marked checkpoints in a row, and the edits applied by then.

    Each signal is followed over the checkpoints at which it was measured. `low` is the checkpoint before the marked one
    (the collapse lies between the two), `n` the number of checkpoints of that signal; the value is None where it never
    happened. `collapse_unconfirmed` is the last step, where it is marked and no later checkpoint could confirm it. Empty
    where neither signal was measured.
    """
    signals = [s for s in (perplexity_marks(editor), retention_marks(editor)) if len(s[0])]
    if not signals:
        return {}
    onsets = [f for s in signals if (f := _onset(*s)) is not None]
    if onsets:
        first = min(onsets, key=lambda f: (f["value"] or 0, f["low"] or 0))
        edits = {k: float(run.edits_at(np.array([first[k]]))[0]) for k in ("value", "low", "high")}
        return {"collapse_step": first, "collapse_edits": first | edits}
    never = never_within(max(len(steps) for steps, _ in signals))
    last = [_from_checkpoint(steps, len(steps) - 1) for steps, marked in signals if marked[-1]]
    unconfirmed = {"collapse_unconfirmed": max(last, key=lambda f: f["value"] or 0)} if last else {}
    return {"collapse_step": never, "collapse_edits": dict(never)} | unconfirmed


def perplexity_marks(editor: EditorRun) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and whether the pooled NLL per token is more than LOG_PERPLEXITY above the unedited model's on the same texts."""
    rows = text_answers(editor)
    total = rows.groupby("step")[["logprob", "n_tokens", "logprob_unedited", "n_tokens_unedited"]].sum()
    shift = total["logprob_unedited"] / total["n_tokens_unedited"] - total["logprob"] / total["n_tokens"]
    return shift.index.to_numpy(), (shift > LOG_PERPLEXITY).to_numpy()


def retention_marks(editor: EditorRun) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and whether what the edits gained in token accuracy is under RETAINED x their mean gain right after the edit so far.

    A gain is the accuracy minus the unedited model's on the same questions, so that what it knew anyway does not count as
    retained. A checkpoint is marked only where the mean gain right after the edit is at least LEAST_GAIN.
    """
    rows = editor.records
    rows = rows[(rows["split"] == "edit") & rows["live"] & rows["tf"].notna()]
    gain = rows["tf"] - np.nan_to_num(editor.base["tf"].to_numpy()[rows["question"]])
    rows = rows.assign(gain=gain, top=gain * rows["weight"], n=1.0)
    first = rows[rows["role"] == AFTER].groupby("step")[["gain", "n"]].sum().cumsum()
    kept = rows[rows["role"] == PANEL].groupby("step")[["top", "weight", "n"]].sum()
    kept = kept[kept["n"] >= LEAST_EDITS]
    so_far = (first["gain"] / first["n"]).reindex(kept.index.union(first.index)).ffill().reindex(kept.index)
    lost = (kept["top"] / kept["weight"] < RETAINED * so_far) & (so_far >= LEAST_GAIN)
    return kept.index.to_numpy(), lost.to_numpy()


def _onset(steps: np.ndarray, marked: np.ndarray) -> Interval | None:
    twice = np.flatnonzero(marked[:-1] & marked[1:])
    if not len(twice):
        return None
    return _from_checkpoint(steps, int(twice[0]))


def _from_checkpoint(steps: np.ndarray, at: int) -> Interval:
    """An event between a checkpoint and the one before it."""
    before = float(steps[at - 1]) if at else 0.0
    return {"value": float(steps[at]), "low": before, "high": float(steps[at]), "n": len(steps)}


TIMES = 10.0
"""A step is hard where it changes the weights more than this many times as much as the median step before it."""
LEAST_STEPS = 10
"""Fewest earlier steps for which their median counts."""
FIELDS = ("prompt", "target", "previous", "subject", "relation", "image")


def find_hard_edits(run: Run, editor: EditorRun) -> pd.DataFrame | None:
    """Hard edits: edit (row of `run.events`), step, why; None where neither criterion can be evaluated."""
    between, sizes = _only_step(editor, collapse(run, editor)), step_sizes(editor)
    if sizes is None and between is None:
        return None
    why: dict[int, str] = {}
    for step, times in large_steps(sizes).items() if sizes is not None else ():
        why[int(str(step))] = f"changed the weights {times:.0f} times as much as the median edit before"
    if between is not None:
        why[between] = "the model broke between the checkpoints just before and just after"
    hard = run.events["step"].isin(list(why))
    return pd.DataFrame({"edit": np.flatnonzero(hard), "step": run.events["step"][hard], "why": run.events["step"][hard].map(why)})


def step_sizes(editor: EditorRun) -> pd.Series | None:
    """Size of each step's own change of weights, sqrt(|D_t|^2 - |D_{t-1}|^2), which is exact where steps are orthogonal.

    D is the accumulated change of weights, |.| the Frobenius norm; a step that shrinks D counts as 0. None for editors
    that change no weights.
    """
    norm = editor.reports.set_index("step")["delta_norm"].astype(float)
    if norm.isna().all() or not (norm > 0).any():
        return None
    squared = norm.fillna(np.inf) ** 2
    with np.errstate(invalid="ignore"):
        return squared.diff().fillna(squared.iloc[0]).clip(lower=0) ** 0.5


def large_steps(sizes: pd.Series) -> pd.Series:
    """The ratio of a step's size to the median of all earlier ones, for steps where it is over TIMES."""
    usual = sizes.where(sizes > 0).expanding(LEAST_STEPS).median().shift()
    return (sizes / usual)[sizes > TIMES * usual]


def hard_edits(run: Run, editor: EditorRun) -> dict[str, Interval]:
    """{"hard_edits": ...} with the number of hard edits among n applied; empty where no criterion can be evaluated."""
    hard = find_hard_edits(run, editor)
    return {} if hard is None else {"hard_edits": point(len(hard), len(run.events))}


def hard_edits_as_jsonl(run: Run, editor: EditorRun) -> str:
    """The hard edits as JSON lines with the edited fact, edit_id, editor, step and why; empty where there are none.

    `image` is the picture's key: a row with a picture can be read where a file of that name lies beside the JSON lines.
    """
    hard = find_hard_edits(run, editor)
    lines = []
    for edit, step, why in [] if hard is None else zip(hard["edit"], hard["step"], hard["why"]):
        event = run.events.iloc[edit]
        row: dict[str, Any] = {name: event[name] for name in FIELDS if pd.notna(event[name])}
        row |= {"edit_id": event["edit_id"], "editor": editor.name, "step": int(step), "why": why}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def _only_step(editor: EditorRun, collapsed: dict[str, Interval]) -> int | None:
    """The step in which the model collapsed, where the interval of the collapse holds one step only."""
    point = collapsed.get("collapse_step")
    if point is None or point["value"] is None:
        return None
    steps = editor.reports["step"]
    inside = steps[(steps > (point["low"] or 0)) & (steps <= (point["high"] or 0))]
    return int(inside.iloc[0]) if len(inside) == 1 else None
