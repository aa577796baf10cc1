"""What a run was and cost: from its manifest and the reports of its edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.metrics import orders
from analysis.metrics.alarm import EVIDENCE, watch
from analysis.metrics.bootstrap import Draws, Interval, Resampler
from analysis.reading.load import EditorRun, Run

PRECISION = ("edit_success", "text_generality", "locality_hard", "portability", "general_score")
"""Metrics whose half-widths say what the probe budget bought."""


def cost(editor: EditorRun, rng: np.random.Generator) -> dict[str, Interval]:
    """edits, seconds_per_edit, state_bytes (after the last step) and peak_bytes (largest), from edits.jsonl."""
    steps = editor.reports
    if steps.empty:
        return {}
    given = steps["event_ids"].map(len).to_numpy()
    left = (steps["failed"].map(_size) + steps["skipped"].map(_size)).to_numpy()
    out: dict[str, Interval] = {"edits": _number(given.sum() - left.sum(), int(given.sum()))}
    draw = Resampler(len(steps), rng)
    seconds = draw.ratios(np.arange(len(steps)), steps[["seconds"]].to_numpy(float), given[:, None].astype(float))[0]
    if seconds is not None:
        out["seconds_per_edit"] = Draws(seconds.values, int(given.sum()), seconds.clusters, None).interval()
    out["state_bytes"] = _number(steps["state_bytes"].iloc[-1], len(steps))
    out["peak_bytes"] = _number(steps["peak_bytes"].max(), len(steps))
    return out


def describe(runs: Sequence[Run], editors: Mapping[str, Mapping[str, Interval]], expected: Sequence[str]) -> dict[str, Any]:
    """The manifest, what was read, what the probe budget bought, and notes about what was not measured or not done."""
    run = runs[0]
    notes = list(dict.fromkeys(n for r in runs for n in r.notes)) + orders.notes(runs)
    for name, entries in editors.items():
        absent = [m for m in expected if m not in entries]
        notes += [f"{name}: not measured: {', '.join(absent)}"] if absent else []
    notes = gathered(notes, list(editors))
    last = {name: int(e.records["step"].max()) for name, e in run.editors.items()}
    left = {name: left_out(e) for name, e in run.editors.items()}
    out = run.manifest | {"notes": notes, "planned_step": run.planned_step, "last_step": last, "not_applied": left}
    out |= {"seeds": [r.manifest.get("seed") for r in runs], "precision": precision(editors)}
    found = [a for a in map(watch, run.editors.values()) if a is not None]
    if found:
        out["alarm"] = {"false_alarm_at_most": max(a.false_alarm for a in found), "evidence": EVIDENCE}
    return out


def gathered(notes: Sequence[str], editors: Sequence[str]) -> list[str]:
    """The notes, those that several editors share as one line that names them all, where the first of them stood."""
    sharing: dict[tuple[bool, str], list[str]] = {}
    for note in notes:
        name = next((e for e in editors if note.startswith(f"{e}: ")), None)
        text = note if name is None else note.removeprefix(f"{name}: ")
        sharing.setdefault((name is None, text), []).extend([name] if name else [])
    return [f"{', '.join(names)}: {text}" if names else text for (_, text), names in sharing.items()]


def precision(editors: Mapping[str, Mapping[str, Interval]]) -> dict[str, dict[str, float]]:
    """Median over editors of half the width of the interval and of the answers behind it, by metric, for the reading that leads."""
    out = {}
    lead = "_gen" if any("edit_success_gen" in e for e in editors.values()) else ""
    for name in (n + lead for n in PRECISION):
        known = [e[name] for e in editors.values() if name in e and e[name]["low"] is not None and e[name]["high"] is not None]
        if known:
            halves = [(float(k["high"] or 0) - float(k["low"] or 0)) / 2 for k in known]
            out[name] = {"half_width": float(np.median(halves)), "n": float(np.median([float(k["n"] or 0) for k in known]))}
    return out


def left_out(editor: EditorRun) -> dict[str, dict[str, int]]:
    """How many edits failed or were skipped, by reason."""
    return {kind: _reasons(editor.reports[kind]) for kind in ("failed", "skipped")}


def _reasons(column: pd.Series) -> dict[str, int]:
    found = [reason for entry in column if isinstance(entry, dict) for reason in entry.values()]
    return {str(k): int(v) for k, v in pd.Series(found, dtype=object).value_counts().items()}


def _size(entry: Any) -> int:
    return len(entry) if isinstance(entry, dict) else 0


def _number(value: float, n: int) -> Interval:
    return {"value": float(value), "low": None, "high": None, "n": n}
