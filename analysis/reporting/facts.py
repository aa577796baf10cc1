"""What a reader of the report is told in words: a sentence per editor, and the facts it lost worst."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.metrics.answers import at_end, right_after
from analysis.metrics.catalogue import READING_TITLES, show
from analysis.reading.load import EditorRun, Run, texts

MOST = 10


def headline(metrics: dict[str, Any], suffix: str) -> str:
    """One sentence from numbers: what was kept, what was lost, what was damaged. Unmeasured parts are left out."""
    parts = [_success(metrics, suffix), _reach(metrics, suffix), _damage(metrics, suffix), _collapse(metrics)]
    sentence = "; ".join(p for p in parts if p)
    return f"{sentence[0].upper()}{sentence[1:]} (by {READING_TITLES[suffix]})." if sentence else "Nothing was measured."


def worst_forgotten(run: Run, editor: EditorRun, reading: str, most: int = MOST) -> list[dict[str, Any]]:
    """Live edits that were right (or best) right after the edit and are wrong now, the largest loss first.

    Equal losses are ordered by log-probability per token of the answer now, the least likely first.
    """
    first, last = right_after(editor.records), at_end(editor.records, "edit")
    both = last.merge(first, on="edit", suffixes=("", "_then"))
    both["loss"] = both[f"{reading}_then"] - both[reading]
    both["likely"] = both["logprob"] / both["n_tokens"]
    lost = both[both["loss"] > 0].sort_values(["loss", "likely", "edit"], ascending=[False, True, True]).head(most)
    answers = _answers(run, editor, lost) if len(lost) else {}
    return [_fact(run, row, answers) for row in lost.itertuples()]


def count_forgotten(editor: EditorRun, reading: str) -> tuple[int, int]:
    """(edits right after the edit and not at the end, edits asked at both moments)."""
    both = at_end(editor.records, "edit").merge(right_after(editor.records), on="edit", suffixes=("", "_then"))
    both = both[both[reading].notna() & both[f"{reading}_then"].notna()]
    return int(((both[f"{reading}_then"] == 1) & (both[reading] < 1)).sum()), len(both)


def _success(m: dict[str, Any], suffix: str) -> str:
    end, now = m.get("edit_success" + suffix), m.get("edit_success_now" + suffix)
    if end is None:
        return f"{_percent(now)} of edits are right just after they are made" if now else ""
    reach = f" ({100 * end['low']:.0f} to {_percent(end, 'high')})" if end["low"] is not None else ""
    then = f", {_percent(now)} were just after the edit" if now else ""
    return f"{_percent(end)}{reach} of {end['n']:,} live edits are right in the end{then}"


def _reach(m: dict[str, Any], suffix: str) -> str:
    named = {
        "text_generality": "of rephrased questions right",
        "image_generality": "with other pictures",
        "locality_hard": "of look-alikes left as they were",
    }
    return ", ".join(f"{_percent(m[k + suffix])} {words}" for k, words in named.items() if k + suffix in m)


def _damage(m: dict[str, Any], suffix: str) -> str:
    parts = []
    if drop := m.get("general_drop" + suffix):
        sure = drop["low"] is not None and (drop["low"] > 0 or drop["high"] < 0)
        change = show("general_drop", -drop["value"])
        parts.append(
            "general ability unchanged" if change == "0.0" else f"general ability {change} points{'' if sure else ' (within error)'}"
        )
    if ratio := m.get("perplexity_ratio"):
        text = show("perplexity_ratio", ratio["value"])
        parts.append("perplexity unchanged" if text == "1.000" else f"perplexity × {text}")
    return ", ".join(parts)


def _collapse(m: dict[str, Any]) -> str:
    point = m.get("collapse_step")
    return f"the model broke down by step {point['value']:,.0f}" if point else ""


def _percent(entry: dict[str, Any], key: str = "value") -> str:
    return f"{100 * entry[key]:.0f} %"


def _answers(run: Run, editor: EditorRun, lost: pd.DataFrame) -> dict[tuple[str, int], str]:
    ids = run.questions["question_id"].to_numpy()
    asked_ids = np.unique(np.concatenate([ids[lost["question"]], ids[lost["question_then"]]]))
    steps = np.unique(np.concatenate([lost["step"], lost["step_then"]]))
    found = texts(editor, asked_ids.tolist(), steps.tolist())
    rows: list[Any] = list(found.itertuples())
    return {(r.question_id, int(r.probe_step)): str(r.generated) for r in rows if pd.notna(r.generated)}


def _fact(run: Run, row: Any, answers: dict[tuple[str, int], str]) -> dict[str, Any]:
    event, ids = run.events.iloc[row.edit], run.questions["question_id"].to_numpy()
    return {
        "prompt": event["prompt"],
        "image": event["image"] if pd.notna(event["image"]) else None,
        "target": event["target"],
        "then": answers.get((ids[row.question_then], int(row.step_then)), "–"),
        "now": answers.get((ids[row.question], int(row.step)), "–"),
        "step": int(event["step"]),
        "age": int(row.age),
        "loss": float(row.loss),
    }
