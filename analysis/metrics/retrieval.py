"""How facts were found, let through and read, from the ledgers that retrieval editors leave in `extras`.

An editor cannot know which fact a question is about, so the ledger holds event ids alone (`retrieved`, nearest first;
`used`, those put before the question) and is judged here, against the events of the stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.reading.extras import answers_with
from analysis.reading.load import Run

BEARING = ("edit", "text_generality", "image_generality", "portability")
"""Splits whose questions one edit bears on, once it is made; on those of locality and general splits none does."""
STALE = "stale"
"""The edit's own question once more, judged by the value before; left out."""
ERRORS = ("miss", "reject", "wrong", "ignored")
"""Why a question that a fact bears on was answered wrongly: it was not retrieved; it was, and no fact was let through;
another one was; it stood before the question, and the answer did not follow it."""
_COLUMNS = ("edit_id", "probe_step", "split", "exact", "incl_prob", "seconds")


def ledgers(folder: Path) -> pd.DataFrame:
    """The generated answers of an editor's folder that have a ledger; empty where none has.

    Columns: edit_id, step, split, exact (bool), weight, seconds, retrieved and used (lists of event ids), tokens
    (added to the question's prompt and spent on its gate), dropped (facts for which the window had no room).
    """
    rows = answers_with(folder, "retrieved", _COLUMNS)
    rows = rows[rows["exact"].notna()].reset_index(drop=True)
    ledger = [json.loads(x) for x in rows.pop("extras")]
    rows["exact"], rows["weight"] = rows["exact"].astype(bool), 1 / rows.pop("incl_prob").astype(float)
    rows["retrieved"], rows["used"] = [x["retrieved"] for x in ledger], [x["used"] for x in ledger]
    rows["tokens"] = [x.get("added_tokens", 0) + x.get("gate_tokens", 0) for x in ledger]
    rows["dropped"] = [x.get("dropped", 0) for x in ledger]
    return rows.rename(columns={"probe_step": "step"})


def judged(rows: pd.DataFrame, events: pd.DataFrame) -> pd.DataFrame:
    """The ledgers with the truth beside them, but for stale questions.

    Adds facts (live when asked), bears (a fact bears on the question), rank (1 for the nearest; 0 where the bearing
    fact was not retrieved), right (it stands before the question), any (some fact does), error (one of `ERRORS`, or "").
    """
    rows = rows[rows["split"] != STALE]
    newer = {r.revises: r for r in events.itertuples() if r.revises}
    retired = set(events["edit_id"][events["kind"] == "retire"])
    made = dict(zip(events["edit_id"], events["step"]))
    asked = zip(rows["split"], rows["edit_id"], rows["step"])
    held = [_newest(newer, e, s) if split in BEARING and e is not None and made[e] <= s else None for split, e, s in asked]
    truth = [None if e in retired else e for e in held]
    out = rows.assign(facts=_live(events, rows["step"].to_numpy()), bears=[t is not None for t in truth])
    out["rank"] = [found.index(t) + 1 if t in found else 0 for t, found in zip(truth, rows["retrieved"])]
    out["right"] = [t is not None and t in used for t, used in zip(truth, rows["used"])]
    out["any"] = [bool(used) for used in rows["used"]]
    out["error"] = [_error(row) for row in out[["bears", "exact", "rank", "right", "any"]].itertuples(index=False)]
    return out


def _newest(newer: dict[Any, Any], edit_id: str, step: int) -> str:
    """The event that is the newest of its fact after `step`; newer: event id -> row of events.parquet that revises it."""
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
    """Number of facts that some event holds after each step."""
    gone = np.sort(events["superseded_step"].dropna().to_numpy())
    held = np.sort(events["step"].to_numpy())
    retired = events[events["kind"] == "retire"]
    withdrawn, again = np.sort(retired["step"].to_numpy()), np.sort(retired["superseded_step"].dropna().to_numpy())
    up_to = [np.searchsorted(x, steps, side="right") for x in (held, gone, withdrawn, again)]
    return up_to[0] - up_to[1] - up_to[2] + up_to[3]


def by_facts(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each doubling of the number of facts; shares are weighted by 1 / inclusion probability.

    facts_from, facts_to; questions, and of these unrelated (no fact bears on them);
    hit_rate and reciprocal_rank over questions that a fact bears on; scope_precision
    (of the questions given a fact, those given the bearing one); scope_recall (of those that one bears on);
    false_accept (of the others, those given a fact); `ERRORS` as shares of the questions that a fact bears on; tokens,
    dropped and seconds a question.
    """
    rows = rows[rows["facts"] > 0]
    made = []
    powers = np.floor(np.log2(rows["facts"].to_numpy(float))).astype(int)
    for power in sorted(set(powers.tolist())):
        part = rows[powers == power]
        on, off, told = part[part["bears"]], part[~part["bears"]], part[part["any"]]
        share = {e: _mean(on, on["error"] == e) for e in ERRORS}
        made.append(
            {
                "facts_from": 2**power,
                "facts_to": 2 ** (power + 1) - 1,
                "questions": len(part),
                "unrelated": len(off),
                "hit_rate": _mean(on, on["rank"] > 0),
                "reciprocal_rank": _mean(on, 1 / on["rank"].replace(0, np.inf)),
                "scope_precision": _mean(told, told["right"]),
                "scope_recall": _mean(on, on["right"]),
                "false_accept": _mean(off, off["any"]),
                **share,
                **{name: _mean(part, part[name]) for name in ("tokens", "dropped", "seconds")},
            }
        )
    return pd.DataFrame(made)


def _mean(rows: pd.DataFrame, value: pd.Series) -> float:
    return float(np.average(value.astype(float), weights=rows["weight"])) if len(rows) else float("nan")


def table(runs: Sequence[Run]) -> pd.DataFrame:
    """`by_facts` of every order and every editor with ledgers, its seed and name first; empty where there is none."""
    parts = []
    for run in runs:
        for name, editor in run.editors.items():
            rows = ledgers(editor.folder)
            if len(rows):
                parts.append(pd.concat({(run.manifest.get("seed"), name): by_facts(judged(rows, run.events))}, names=["seed", "editor"]))
    return pd.concat(parts).reset_index(["seed", "editor"]).reset_index(drop=True) if parts else pd.DataFrame()
