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
from analysis.metrics.ability import broken_text, side_effect_metrics
from analysis.metrics.alarm import alarm_promise, alarm_step
from analysis.metrics.answers import SIGNED, Metrics, at_end, combined, in_common, mean_scores, means, right_after, unedited
from analysis.metrics.bootstrap import REPLICATES, Interval, Resampler, harmonic, point
from analysis.metrics.catalogue import GENERALITY, KINDS, LOCALITY, split_name
from analysis.metrics.collapse import collapse, hard_edits
from analysis.metrics.comparison import competing, main_mode
from analysis.metrics.forgetting import edit_metrics
from analysis.metrics.from_extras import counterfact_scores, deferral, face_scores, first_token_agreement, self_assessment, truthfulness
from analysis.metrics.plugin import plugin_metrics
from analysis.metrics.safety import nothing_to_lose, safety_alarm_steps, safety_alarms
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import SCORES

PUBLISHED = (*GENERALITY, "locality_hard")
"""Kinds in the harmonic mean of the papers."""
_OWN_NAMES = (*KINDS, "portability")
_OTHERS = {"stale_rate": "stale", "relapse_rate": "persistence", "general_score": "general"}
AT_END = {"edit_success": "edit"} | dict(zip(_OWN_NAMES, _OWN_NAMES)) | _OTHERS
"""Name to split of the metrics that are mean scores at the end."""
OTHER_SIDES = ("generality_reversed", *(f"portability_{hops}hop" for hops in range(3, 7)))
"""Metrics, each the mean score at the end of the split of its name, that only streams with such questions have."""
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
    pooled = {e: _pool([o.measured[e] for o in by_order]) | _pool_points([o.points[e] for o in by_order]) for e in runs[0].editors}
    editors = {e: named_weakest(entries) for e, entries in pooled.items()}
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
    """Metrics that are no means over answers: collapse, alarm, hard edits, cost."""
    alarms = alarm_step(editor) | safety_alarm_steps(run, editor)
    without_number = broken_text(editor) | nothing_to_lose(run, editor)
    return collapse(run, editor) | alarms | hard_edits(run, editor) | cost(editor, rng) | without_number


def measure(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """All metrics that are functions of answers, with their replicates."""
    rows = editor.records
    metrics: Metrics = {}
    for name, split in (AT_END | dict(zip(OTHER_SIDES, OTHER_SIDES))).items():
        metrics |= mean_scores(name, at_end(rows, split), resampler)
    metrics |= mean_scores("edit_success_now", right_after(rows), resampler) | gain(editor, resampler)
    metrics |= over_kinds(metrics) | edit_metrics(run, editor, resampler)
    metrics |= side_effect_metrics(run, editor, resampler)
    metrics |= counterfact_scores(editor, resampler) | face_scores(editor, resampler) | self_assessment(run, editor, resampler)
    metrics |= first_token_agreement(run, editor, resampler) | truthfulness(run, editor, resampler) | deferral(run, editor, resampler)
    metrics |= plugin_metrics(run, editor, resampler)
    return {name: d for name, d in metrics.items() if not np.isnan(d.value)}


def over_kinds(known: Metrics) -> Metrics:
    """Harmonic means and the minimum over kinds of generality and locality.

    harmonic_mean: of both generalities, hard and sibling locality, of those that were measured, at least one of each side.
    harmonic_mean_published: of both generalities and hard locality, as in the papers. weakest: the minimum over all kinds.
    """
    measured = [k for k in KINDS if k in known]
    metrics = combined("harmonic_mean_published", harmonic, PUBLISHED, known)
    parts = [k for k in (*PUBLISHED, "locality_sibling") if k in measured]
    if any(k in parts for k in GENERALITY) and any(k in parts for k in LOCALITY):
        metrics |= combined("harmonic_mean", harmonic, parts, known)
    return metrics | (combined("weakest", lambda *v: np.min(v, axis=0), measured, known) if measured else {})


def named_weakest(entries: dict[str, Interval]) -> dict[str, Any]:
    """The entries, with the `kind` that is the smallest beside each entry `weakest`."""
    out: dict[str, Any] = dict(entries)
    for name in [n for n in entries if split_name(n)[0] == "weakest"]:
        own = {k: entry["value"] or 0.0 for k in KINDS if (entry := entries.get(k + split_name(name)[1].suffix)) is not None}
        out[name] = entries[name] | {"kind": KINDS[min(own, key=lambda k: own[k])]}
    return out


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
    references = run.manifest.get("references", ())
    out |= {"not_applied": not_applied, "seeds": [r.manifest.get("seed") for r in runs], "precision": precision(editors, references)}
    watched = [e for name, e in run.editors.items() if name not in references]
    promise = alarm_promise(watched, [alarm for e in watched for alarm in safety_alarms(run, e).values()])
    return out | ({"alarm": promise} if promise else {})


def merged_notes(notes: Sequence[str], editors: Sequence[str]) -> list[str]:
    """Joins notes that several editors share into one that names them all, at the position of the first."""
    sharing: dict[tuple[bool, str], list[str]] = {}
    for note in notes:
        name = next((e for e in editors if note.startswith(f"{e}: ")), None)
        text = note if name is None else note.removeprefix(f"{name}: ")
        sharing.setdefault((name is None, text), []).extend([name] if name else [])
    return [f"{', '.join(names)}: {text}" if names else text for (_, text), names in sharing.items()]


def precision(editors: Mapping[str, Mapping[str, Interval]], references: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The widest interval of a competing editor by metric of PRECISION: half_width, editor, n and questions.

    The metrics are those of the leading scoring mode.
    """
    summary = {"editors": editors, "run": {"references": references}}
    out: dict[str, dict[str, Any]] = {}
    for name in (n + main_mode(summary).suffix for n in PRECISION):
        known = {e: editors[e][name] for e in competing(summary) if name in editors[e] and editors[e][name]["low"] is not None}
        halves = {e: (float(m["high"] or 0) - float(m["low"] or 0)) / 2 for e, m in known.items()}
        if halves:
            widest = max(halves, key=lambda e: halves[e])
            counts = {k: known[widest].get(k) for k in ("n", "questions")}
            out[name] = {"half_width": halves[widest], "editor": widest} | counts
    return out


def _reasons(column: pd.Series) -> dict[str, int]:
    """Number of edits by reason, from a column of dictionaries of event id to reason."""
    reasons = [reason for entry in column if isinstance(entry, dict) for reason in entry.values()]
    return {str(k): int(v) for k, v in pd.Series(reasons, dtype=object).value_counts().items()}
