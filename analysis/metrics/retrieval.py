"""How editors with a fact store retrieve, accept and use facts, from the retrieval logs in `extras`.

An editor cannot know which fact a question is about, so its log holds event ids alone (`retrieved`, nearest first; `used`,
the facts in the prompt) and is judged here, against the events of the stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.reading.load import Run
from analysis.reading.records import answers_with

BEARING = ("edit", "text_generality", "image_generality", "portability")
"""Splits whose questions one edit bears on, once it is made; no edit bears on locality and general questions."""
ERRORS = ("miss", "reject", "wrong", "ignored")
"""Why the answer to a question that a fact bears on was wrong: the fact was not retrieved; it was retrieved and no fact was
accepted; another fact was accepted; the fact was in the prompt and the answer did not follow it."""
_COLUMNS = ("edit_id", "probe_step", "split", "exact", "incl_prob", "seconds")


def retrieval_logs(folder: Path) -> pd.DataFrame:
    """The generated answers of an editor's folder that have a retrieval log; empty where none has.

    Columns: edit_id, step, split, exact (bool), weight, seconds, retrieved and used (lists of event ids), tokens
    (added to the question's prompt and spent on its gate), dropped (accepted facts that did not fit the context window).
    """
    rows = answers_with(folder, "retrieved", _COLUMNS)
    rows = rows[rows["exact"].notna()].reset_index(drop=True)
    logs = [json.loads(x) for x in rows.pop("extras")]
    rows["exact"], rows["weight"] = rows["exact"].astype(bool), 1 / rows.pop("incl_prob").astype(float)
    rows["retrieved"], rows["used"] = [x["retrieved"] for x in logs], [x["used"] for x in logs]
    rows["tokens"] = [x.get("added_tokens", 0) + x.get("gate_tokens", 0) for x in logs]
    rows["dropped"] = [x.get("dropped", 0) for x in logs]
    return rows.rename(columns={"probe_step": "step"})


def judged(rows: pd.DataFrame, events: pd.DataFrame) -> pd.DataFrame:
    """Retrieval logs judged against the events, without stale questions (the edit's own again, judged by the value before).

    Adds facts (number of live ones at the step), bears (a fact bears on the question), rank (of the bearing fact, 1 for
    the nearest; 0 where it was not retrieved), right (it is in the prompt), any (some fact is), error (one of `ERRORS`, or "").
    """
    rows = rows[rows["split"] != "stale"]
    newer = {r.revises: r for r in events.itertuples() if r.revises}
    retired = set(events["edit_id"][events["kind"] == "retire"])
    made = dict(zip(events["edit_id"], events["step"]))
    questions = zip(rows["split"], rows["edit_id"], rows["step"])
    held = [_newest(newer, e, s) if split in BEARING and e is not None and made[e] <= s else None for split, e, s in questions]
    truth = [None if e in retired else e for e in held]
    out = rows.assign(facts=_live(events, rows["step"].to_numpy()), bears=[t is not None for t in truth])
    out["rank"] = [retrieved.index(t) + 1 if t in retrieved else 0 for t, retrieved in zip(truth, rows["retrieved"])]
    out["right"] = [t is not None and t in used for t, used in zip(truth, rows["used"])]
    out["any"] = [bool(used) for used in rows["used"]]
    out["error"] = [_error(row) for row in out[["bears", "exact", "rank", "right", "any"]].itertuples(index=False)]
    return out


def _newest(newer: dict[Any, Any], edit_id: str, step: int) -> str:
    """The newest event of the fact of `edit_id` up to `step`; newer: event id to the row of events.parquet that revises it."""
    while edit_id in newer and newer[edit_id].step <= step:
        edit_id = newer[edit_id].edit_id
    return edit_id


def _error(row: Any) -> str:
    bears, exact, rank, right, used = row
    if not bears or exact:
        return ""
    if not rank and not right:
        return "miss"
    return "ignored" if right else "wrong" if used else "reject"


def _live(events: pd.DataFrame, steps: np.ndarray) -> np.ndarray:
    """Number of live facts after each step: events less superseded ones, without those that retire a fact."""
    retired = events["kind"] == "retire"
    counts = []
    for some in (events, events[retired]):
        made, gone = np.sort(some["step"].to_numpy()), np.sort(some["superseded_step"].dropna().to_numpy())
        counts.append(np.searchsorted(made, steps, side="right") - np.searchsorted(gone, steps, side="right"))
    return counts[0] - counts[1]


def by_facts(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each doubling of the number of facts; shares are weighted by 1 / inclusion probability.

    Columns: facts_from, facts_to; questions, and unrelated (those that no fact bears on); hit_rate and reciprocal_rank over
    questions that a fact bears on; scope_precision (of the questions with a fact in the prompt, those with the bearing one);
    scope_recall (of the questions that a fact bears on, those with it in the prompt); false_accept (of the unrelated
    questions, those with a fact in the prompt); `ERRORS` as shares of the questions that a fact bears on; mean tokens,
    dropped facts and seconds of a question.
    """
    rows = rows[rows["facts"] > 0]
    powers = np.floor(np.log2(rows["facts"].to_numpy(float))).astype(int)
    return pd.DataFrame([_shares(int(power), rows[powers == power]) for power in np.unique(powers)])


def _shares(power: int, rows: pd.DataFrame) -> dict[str, float]:
    """The row of `by_facts` for stores of 2^power to 2^(power+1) - 1 facts."""
    bearing, unrelated, prompted = rows[rows["bears"]], rows[~rows["bears"]], rows[rows["any"]]
    return {
        "facts_from": 2**power,
        "facts_to": 2 ** (power + 1) - 1,
        "questions": len(rows),
        "unrelated": len(unrelated),
        "hit_rate": _mean(bearing, bearing["rank"] > 0),
        "reciprocal_rank": _mean(bearing, 1 / bearing["rank"].replace(0, np.inf)),
        "scope_precision": _mean(prompted, prompted["right"]),
        "scope_recall": _mean(bearing, bearing["right"]),
        "false_accept": _mean(unrelated, unrelated["any"]),
        **{error: _mean(bearing, bearing["error"] == error) for error in ERRORS},
        **{name: _mean(rows, rows[name]) for name in ("tokens", "dropped", "seconds")},
    }


def _mean(rows: pd.DataFrame, value: pd.Series) -> float:
    return float(np.average(value.astype(float), weights=rows["weight"])) if len(rows) else float("nan")


def table(runs: Sequence[Run]) -> pd.DataFrame:
    """`by_facts` of every order and every editor with retrieval logs, after its seed and name; empty where there is none."""
    parts = []
    for run in runs:
        for name, editor in run.editors.items():
            rows = retrieval_logs(editor.folder)
            if len(rows):
                parts.append(pd.concat({(run.manifest.get("seed"), name): by_facts(judged(rows, run.events))}, names=["seed", "editor"]))
    return pd.concat(parts).reset_index(["seed", "editor"]).reset_index(drop=True) if parts else pd.DataFrame()
