"""The content of summary.json: a description of the run, the metrics of every editor and their paired differences.

Formulas, units and directions are in docs/semantics.md. Every mean is a Hajek mean, sum(w y) / sum(w) with w = 1 / inclusion
probability. "At the end" is the last step with answers to that kind of question. A kind of question without answers gives
no metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from analysis.metrics import orders
from analysis.metrics.ability import side_effect_metrics
from analysis.metrics.alarm import EVIDENCE, alarm_step, run_alarm
from analysis.metrics.answers import SIGNED, Metrics, at_end, harmonic_means, in_common, mean_scores, means, right_after, unedited
from analysis.metrics.bootstrap import REPLICATES, Interval, Resampler, point
from analysis.metrics.catalogue import GENERALITY, split_name
from analysis.metrics.collapse import collapse, hard_edits
from analysis.metrics.comparison import main_mode
from analysis.metrics.forgetting import edit_metrics
from analysis.metrics.from_extras import deferral, first_token_agreement, gate_decisions, truthfulness
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import AFTER, SCORES

HARMONIC = (*GENERALITY, "locality_hard")
_OWN_NAMES = (*HARMONIC, "locality_sibling", "locality_far", "locality_text", "portability")
AT_END = {"edit_success": "edit"} | dict(zip(_OWN_NAMES, _OWN_NAMES)) | {"stale_rate": "stale", "general_score": "general"}
"""Name to split of the metrics that are mean scores at the end."""
EXPECTED = (*AT_END, "edit_success_now", "perplexity_ratio")
"""Metrics whose absence gets a note in the summary."""
PRECISION = ("edit_success", "text_generality", "locality_hard", "portability", "general_score")
"""Metrics whose half-widths show the precision that the probe budget gives."""


@dataclass(frozen=True)
class OrderMetrics:
    """Metrics of one order: those with replicates by editor, their differences by pair, and those without replicates."""

    measured: dict[str, Metrics]
    pairs: dict[str, Metrics]
    points: dict[str, dict[str, Interval]]


def summarise(runs: Run | Sequence[Run], seed: int = 0, replicates: int = REPLICATES) -> dict[str, Any]:
    """The content of summary.json: run, editors, pairs. The bootstrap's draws depend on `seed` alone.

    Several runs are orders of one stream; entries then have `sd`, the standard deviation between orders.
    """
    runs = (runs,) if isinstance(runs, Run) else tuple(runs)
    by_order = [measure_order(run, np.random.default_rng((seed, i)), replicates) for i, run in enumerate(runs)]
    editors = {e: _pool([o.measured[e] for o in by_order]) | _pool_points([o.points[e] for o in by_order]) for e in runs[0].editors}
    pairs = {p: _pool([o.pairs[p] for o in by_order]) for p in by_order[0].pairs}
    return {"run": describe(runs, editors), "editors": editors, "pairs": pairs}


def measure_order(run: Run, rng: np.random.Generator, replicates: int = REPLICATES) -> OrderMetrics:
    """All metrics of one order."""
    resampler = Resampler(run.clusters, rng, replicates)
    measured = {name: measure(run, editor, resampler) for name, editor in run.editors.items()}
    points = {n: _points(run, e, rng) for n, e in run.editors.items()}
    pairs = {f"{a} - {b}": differences(run, (a, b), measured, resampler) for a, b in combinations(run.editors, 2)}
    return OrderMetrics(measured, pairs, points)


def _points(run: Run, editor: EditorRun, rng: np.random.Generator) -> dict[str, Interval]:
    """Metrics that are no means over answers: collapse, alarm, hard edits, deferral at the end, cost."""
    steps = editor.records.loc[editor.records["role"] != AFTER, "step"]
    deferred = deferral(gate_decisions(editor, [int(steps.max())])) if len(steps) else {}
    return collapse(run, editor) | alarm_step(editor) | hard_edits(run, editor) | deferred | cost(editor, rng)


def measure(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """All metrics that are functions of answers, with their replicates."""
    rows = editor.records
    metrics: Metrics = {}
    for name, split in AT_END.items():
        metrics |= mean_scores(name, at_end(rows, split), resampler)
    metrics |= mean_scores("edit_success_now", right_after(rows), resampler) | gain(editor, resampler)
    metrics |= harmonic_means("harmonic_mean", HARMONIC, metrics) | edit_metrics(run, editor, resampler)
    metrics |= side_effect_metrics(run, editor, resampler)
    metrics |= first_token_agreement(run, editor, resampler) | truthfulness(run, editor, resampler)
    return {name: d for name, d in metrics.items() if np.isfinite(d.value)}


def gain(editor: EditorRun, resampler: Resampler) -> Metrics:
    """Mean over edits of y_right_after - y_unedited, in [-1, 1]: the learning beyond what the unedited model knew."""
    first = right_after(editor.records)
    return means("edit_gain", first, first[SCORES].to_numpy() - unedited(editor, first), resampler, SIGNED)


def differences(run: Run, names: tuple[str, str], measured: dict[str, Metrics], resampler: Resampler) -> Metrics:
    """Metrics of the first editor minus those of the second, on the questions that both answered at the same step."""
    ours, theirs = (run.editors[n] for n in names)
    a, b = in_common(ours.records, theirs.records)
    first = measured[names[0]] if a is ours.records else measure(run, replace(ours, records=a), resampler)
    second = measured[names[1]] if b is theirs.records else measure(run, replace(theirs, records=b), resampler)
    shared = [m for m in first if m in second and split_name(m)[0] != "half_life"]
    return {m: first[m] - second[m] for m in shared}


def _pool(by_order: Sequence[Metrics]) -> dict[str, Interval]:
    """Intervals of one order, or of the mean over orders for metrics that every order has."""
    if len(by_order) == 1:
        return {name: draws.interval() for name, draws in by_order[0].items()}
    return {n: orders.mean_over_orders([m[n] for m in by_order]) for n in by_order[0] if all(n in m for m in by_order)}


def _pool_points(by_order: Sequence[dict[str, Interval]]) -> dict[str, Interval]:
    """Entries of one order, or the mean and range over the orders that have them."""
    if len(by_order) == 1:
        return by_order[0]
    names = dict.fromkeys(name for m in by_order for name in m)
    return {n: orders.mean_and_range([m[n] for m in by_order if n in m], len(by_order)) for n in names}


def cost(editor: EditorRun, rng: np.random.Generator) -> dict[str, Interval]:
    """edits, seconds_per_edit, state_bytes (after the last step) and peak_bytes (largest), from edits.jsonl."""
    steps = editor.reports
    if steps.empty:
        return {}
    events = steps["event_ids"].map(len).to_numpy()
    not_applied = sum(len(x) for kind in ("failed", "skipped") for x in steps[kind] if isinstance(x, dict))
    out: dict[str, Interval] = {"edits": point(events.sum() - not_applied, int(events.sum()))}
    resampler = Resampler(len(steps), rng)
    alone = pd.DataFrame({"cluster": np.arange(len(steps)), "asked": np.arange(len(steps))})
    seconds = resampler.ratios(alone, steps[["seconds"]].to_numpy(float), events[:, None].astype(float))[0]
    if seconds is not None:
        out["seconds_per_edit"] = replace(seconds, n=int(events.sum()), bounds=None).interval()
    out["state_bytes"] = point(steps["state_bytes"].iloc[-1], len(steps))
    out["peak_bytes"] = point(steps["peak_bytes"].max(), len(steps))
    return out


def describe(runs: Sequence[Run], editors: Mapping[str, Mapping[str, Interval]]) -> dict[str, Any]:
    """The entry `run` of summary.json: the manifest, the steps that were read, the precision of the main metrics, and notes."""
    run = runs[0]
    notes = list(dict.fromkeys(n for r in runs for n in r.notes)) + orders.notes(runs)
    for name, entries in editors.items():
        absent = [m for m in EXPECTED if m not in entries]
        notes += [f"{name}: not measured: {', '.join(absent)}"] if absent else []
    last = {name: int(e.records["step"].max()) for name, e in run.editors.items()}
    not_applied = {n: {kind: _reasons(e.reports[kind]) for kind in ("failed", "skipped")} for n, e in run.editors.items()}
    out = run.manifest | {"notes": merged_notes(notes, list(editors)), "planned_step": run.planned_step, "last_step": last}
    out |= {"not_applied": not_applied, "seeds": [r.manifest.get("seed") for r in runs], "precision": precision(editors)}
    alarms = [a for a in map(run_alarm, run.editors.values()) if a is not None]
    if alarms:
        out["alarm"] = {"false_alarm_at_most": max(a.false_alarm for a in alarms), "evidence": EVIDENCE}
    return out


def merged_notes(notes: Sequence[str], editors: Sequence[str]) -> list[str]:
    """Joins notes that several editors share into one that names them all, at the position of the first."""
    sharing: dict[tuple[bool, str], list[str]] = {}
    for note in notes:
        name = next((e for e in editors if note.startswith(f"{e}: ")), None)
        text = note if name is None else note.removeprefix(f"{name}: ")
        sharing.setdefault((name is None, text), []).extend([name] if name else [])
    return [f"{', '.join(names)}: {text}" if names else text for (_, text), names in sharing.items()]


def precision(editors: Mapping[str, Mapping[str, Interval]]) -> dict[str, dict[str, float]]:
    """Median over editors of the interval's half-width and of the number of answers behind it, by metric of PRECISION.

    The metrics are those of the leading scoring mode.
    """
    out = {}
    for name in (n + main_mode({"editors": editors}).suffix for n in PRECISION):
        known = [e[name] for e in editors.values() if name in e and e[name]["low"] is not None and e[name]["high"] is not None]
        if known:
            halves = [(float(k["high"] or 0) - float(k["low"] or 0)) / 2 for k in known]
            out[name] = {"half_width": float(np.median(halves)), "n": float(np.median([float(k["n"] or 0) for k in known]))}
    return out


def _reasons(column: pd.Series) -> dict[str, int]:
    """Number of edits by reason, from a column of dictionaries of event id to reason."""
    reasons = [reason for entry in column if isinstance(entry, dict) for reason in entry.values()]
    return {str(k): int(v) for k, v in pd.Series(reasons, dtype=object).value_counts().items()}
