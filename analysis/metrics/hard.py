"""Single edits that break a model ("hard" edits), by id, and as a file that `--stream jsonl:FILE` reads.

Source of the notion: Yang et al. 2024 (one edit may blow up perplexity; HardCF, HardEdit). Two signs, from what
a run stores: the only step between the checkpoint at which the model was whole and the one at which it had broken,
and a change of weights many times the usual size.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from analysis.metrics.bootstrap import Interval
from analysis.metrics.collapse import collapse
from analysis.reading.load import EditorRun, Run

TIMES = 10.0
"""A step is out of all proportion where it changes the weights this many times as much as the median step before it."""
LEAST_STEPS = 10
"""Fewer earlier steps than this do not say what is usual."""
FIELDS = ("prompt", "target", "previous", "subject", "relation", "image")


def find(run: Run, editor: EditorRun) -> pd.DataFrame | None:
    """Hard edits: edit (row of `run.events`), step, why; None where neither sign could be looked for."""
    between, sizes = _only_step(editor, collapse(run, editor)), step_sizes(editor)
    if sizes is None and between is None:
        return None
    why: dict[int, str] = {}
    for step, times in out_of_proportion(sizes).items() if sizes is not None else ():
        why[int(str(step))] = f"changed the weights {times:.0f} times as much as the median edit before"
    if between is not None:
        why[between] = "the model broke between the checkpoints just before and just after"
    found = run.events["step"].isin(list(why))
    return pd.DataFrame({"edit": np.flatnonzero(found), "step": run.events["step"][found], "why": run.events["step"][found].map(why)})


def step_sizes(editor: EditorRun) -> pd.Series | None:
    """Size of each step's own change by step, sqrt(|D_t|^2 - |D_{t-1}|^2), exact where steps are orthogonal.

    D is the accumulated change of weights, |.| the Frobenius norm; a step that shrinks D counts 0. None for
    editors that change no weights.
    """
    norm = editor.reports.set_index("step")["delta_norm"].astype(float)
    if norm.isna().all() or not (norm > 0).any():
        return None
    squared = norm.fillna(np.inf) ** 2
    with np.errstate(invalid="ignore"):
        return squared.diff().fillna(squared.iloc[0]).clip(lower=0) ** 0.5


def out_of_proportion(sizes: pd.Series) -> pd.Series:
    """Steps over TIMES the median of all earlier steps, with how many times it was."""
    usual = sizes.where(sizes > 0).expanding(LEAST_STEPS).median().shift()
    return (sizes / usual)[sizes > TIMES * usual]


def hard_edits(run: Run, editor: EditorRun) -> dict[str, Interval]:
    """{"hard_edits": ...}: how many edits are hard, of n applied; nothing where none could be found out."""
    found = find(run, editor)
    return {} if found is None else {"hard_edits": {"value": float(len(found)), "low": None, "high": None, "n": len(run.events)}}


def stream_of(run: Run, editor: EditorRun) -> str:
    """The hard edits as JSON lines: what was edited, and edit_id, editor, step and why. Empty where there are none.

    `image` is the picture's key: a row with a picture can be read where a file of that name lies beside the JSON lines.
    """
    found = find(run, editor)
    rows = [] if found is None else [_row(run.events.iloc[r.edit], editor.name, r) for r in _tuples(found)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _tuples(frame: pd.DataFrame) -> list[Any]:
    return list(frame.itertuples())


def _row(event: pd.Series, editor: str, found: Any) -> dict[str, Any]:
    row = {name: event[name] for name in FIELDS if pd.notna(event[name])}
    return row | {"edit_id": event["edit_id"], "editor": editor, "step": int(found.step), "why": found.why}


def _only_step(editor: EditorRun, found: dict[str, Interval]) -> int | None:
    """The step in which the model broke, where the interval that the detector names holds one step only."""
    point = found.get("collapse_step")
    if point is None:
        return None
    steps = editor.reports["step"]
    inside = steps[(steps > (point["low"] or 0)) & (steps <= (point["high"] or 0))]
    return int(inside.iloc[0]) if len(inside) == 1 else None
