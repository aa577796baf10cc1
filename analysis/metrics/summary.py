"""Metrics as functions of stored answers: formulas, units and directions in docs/semantics.md.

Every mean is a Hajek mean, sum(w y) / sum(w) with w = 1 / inclusion probability. "At the end" is the last step
at which that kind of question was asked. What was not asked gives no metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from analysis.metrics import orders
from analysis.metrics.ability import of_everything_else
from analysis.metrics.alarm import alarm_step
from analysis.metrics.answers import SIGNED, Metrics, at_end, in_common, means, plain_means, right_after, unedited
from analysis.metrics.bootstrap import REPLICATES, Interval, Resampler, combine
from analysis.metrics.catalogue import SUFFIXES, split_name
from analysis.metrics.collapse import collapse
from analysis.metrics.deferral import decisions, deferral
from analysis.metrics.first_ids import of_first_ids
from analysis.metrics.forgetting import of_edits
from analysis.metrics.hard import hard_edits
from analysis.metrics.run_description import cost, describe
from analysis.metrics.truth import truthfulness
from analysis.reading.load import READINGS, EditorRun, Run
from analysis.reading.records import AFTER

AT_END = {
    "edit_success": "edit",
    "text_generality": "text_generality",
    "image_generality": "image_generality",
    "locality_hard": "locality_hard",
    "locality_sibling": "locality_sibling",
    "locality_far": "locality_far",
    "locality_text": "locality_text",
    "portability": "portability",
    "stale_rate": "stale",
    "general_score": "general",
}
HARMONIC = ("text_generality", "image_generality", "locality_hard")
EXPECTED = (*AT_END, "edit_success_now", "perplexity_ratio")
"""Metrics whose absence is told in a note."""


@dataclass(frozen=True)
class Assessed:
    """One order: what was measured of each editor, differences of every two, and what needs no replicates."""

    measured: dict[str, Metrics]
    pairs: dict[str, Metrics]
    points: dict[str, dict[str, Interval]]


def summarise(runs: Run | Sequence[Run], seed: int = 0, replicates: int = REPLICATES) -> dict[str, Any]:
    """Content of summary.json: run, editors, pairs. The bootstrap's draws depend on `seed` alone.

    Several runs are orders of one stream: entries then have `sd`, the standard deviation between orders.
    """
    runs = (runs,) if isinstance(runs, Run) else tuple(runs)
    found = [assess(run, np.random.default_rng(seed), replicates) for run in runs]
    editors = {e: _pool([a.measured[e] for a in found]) | _range([a.points[e] for a in found]) for e in runs[0].editors}
    pairs = {p: _pool([a.pairs[p] for a in found]) for p in found[0].pairs}
    return {"run": describe(runs, editors, EXPECTED), "editors": editors, "pairs": pairs}


def assess(run: Run, rng: np.random.Generator, replicates: int = REPLICATES) -> Assessed:
    """Everything that is computed of one order."""
    resampler = Resampler(run.clusters, rng, replicates)
    measured = {name: measure(run, editor, resampler) for name, editor in run.editors.items()}
    points = {n: _points(run, e, rng) for n, e in run.editors.items()}
    pairs = {f"{a} - {b}": differences(run, (a, b), measured, resampler) for a, b in combinations(run.editors, 2)}
    return Assessed(measured, pairs, points)


def _points(run: Run, editor: EditorRun, rng: np.random.Generator) -> dict[str, Interval]:
    """What is not a mean over answers: the breakdown, the alarm, hard edits, deferral at the end, cost."""
    asked = editor.records.loc[editor.records["role"] != AFTER, "step"]
    left = deferral(decisions(editor, [int(asked.max())])) if len(asked) else {}
    return collapse(run, editor) | alarm_step(editor) | hard_edits(run, editor) | left | cost(editor, rng)


def measure(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """All metrics that are functions of answers, with their replicates."""
    rows = editor.records
    out: Metrics = {}
    for name, split in AT_END.items():
        out |= plain_means(name, at_end(rows, split), resampler)
    out |= plain_means("edit_success_now", right_after(rows), resampler) | gain(editor, resampler)
    out |= harmonic_mean(out) | of_edits(run, editor, resampler) | of_everything_else(run, editor, resampler)
    out |= of_first_ids(run, editor, resampler) | truthfulness(run, editor, resampler)
    return {name: d for name, d in out.items() if np.isfinite(d.value)}


def gain(editor: EditorRun, resampler: Resampler) -> Metrics:
    """Mean over edits of y_right_after - y_unedited: what was learned that was not known before. In [-1, 1]."""
    first = right_after(editor.records)
    return means("edit_gain", first, first[list(READINGS)].to_numpy() - unedited(editor, first), resampler, SIGNED)


def harmonic_mean(known: Metrics) -> Metrics:
    """3 / (1/text_generality + 1/image_generality + 1/locality_hard); 0 where one of them is 0."""
    out = {}
    for suffix in SUFFIXES:
        parts = [known[n + suffix] for n in HARMONIC if n + suffix in known]
        if len(parts) == len(HARMONIC):
            out["harmonic_mean" + suffix] = combine(_harmonic, *parts)
    return out


def differences(run: Run, names: tuple[str, str], measured: dict[str, Metrics], resampler: Resampler) -> Metrics:
    """Metric of the first minus metric of the second, on the questions that both answered at the same step."""
    ours, theirs = (run.editors[n] for n in names)
    a, b = in_common(ours.records, theirs.records)
    first = measured[names[0]] if a is ours.records else measure(run, ours.with_records(a), resampler)
    second = measured[names[1]] if b is theirs.records else measure(run, theirs.with_records(b), resampler)
    shared = [m for m in first if m in second and split_name(m)[0] != "half_life"]
    return {m: first[m] - second[m] for m in shared}


def _pool(found: Sequence[Metrics]) -> dict[str, Interval]:
    """Intervals of one order, or of the mean over orders of what every order has."""
    if len(found) == 1:
        return {name: draws.interval() for name, draws in found[0].items()}
    return {name: orders.spread([m[name] for m in found]) for name in found[0] if all(name in m for m in found)}


def _range(found: Sequence[dict[str, Interval]]) -> dict[str, Interval]:
    """Entries of one order, or the mean and range over the orders that have them."""
    if len(found) == 1:
        return found[0]
    names = dict.fromkeys(name for m in found for name in m)
    return {name: orders.ranged([m[name] for m in found if name in m], len(found)) for name in names}


def _harmonic(*parts: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return len(parts) / np.sum([1 / p for p in parts], axis=0)
