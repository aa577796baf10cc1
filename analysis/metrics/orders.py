"""Several orders of one stream: runs that differ only in their seed, pooled and with the spread between them.

The order of a stream changes results more than the choice of questions does, so an interval from one order does not
cover another order. From three orders on, intervals cover both (see `mean_over_orders`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.stats import t

from analysis.metrics.bootstrap import LEVEL, Draws, Interval, widen
from analysis.reading.load import Run, differing, load_run, side_by_side
from analysis.reading.records import BadRun

LEAST_ORDERS = 3
"""Fewest orders from which the spread between orders is estimated."""
_FREE = ("seed", "editor", "out", "command")
"""Fields of a configuration that may differ between orders."""
_SAME = ("model_hash", "dtype", "grading_version", "edits")


def load_orders(paths: Sequence[str | Path]) -> tuple[Run, ...]:
    """The runs in the folders, one for each order; folders of one schedule become one run with all their editors.

    Raises `BadRun`, with the difference, where folders of several orders differ in more than their seed.
    """
    if not paths:
        raise BadRun("no run folder given; name at least one")
    groups: dict[Any, list[Run]] = {}
    for run in map(load_run, paths):
        groups.setdefault((run.manifest.get("schedule_hash"), tuple(run.events["edit_id"])), []).append(run)
    runs = [side_by_side(group) for group in groups.values()]
    for other in runs[1:]:
        _require_orders(runs[0], other)
    shared = [e for e in runs[0].editors if all(e in r.editors for r in runs)]
    if not shared:
        have = "; ".join(f"{r.folders[0]} has {', '.join(r.editors)}" for r in runs)
        raise BadRun(f"no editor is in every order ({have}); give folders of the same editors")
    return tuple(_with_editors(run, shared) for run in runs)


def mean_over_orders(draws: Sequence[Draws]) -> Interval:
    """Mean over orders, with an interval and `sd`, the standard deviation between orders.

    Half the interval is the larger of the bootstrap's 1.96 standard errors over subjects and, from three orders
    on, Student's t (orders - 1 degrees of freedom) times sd / sqrt(orders), because three values are too few to
    resample. A statistic with infinite replicates gets its range.
    """
    values = np.array([d.value for d in draws])
    if any(not np.isfinite(d.values).all() for d in draws) and draws[0].bounds is None:
        return mean_and_range([d.interval() for d in draws], len(draws))
    many = len(draws)
    within = float(np.sqrt(sum(np.nanvar(d.values[1:]) for d in draws)) / many)
    sd = float(values.std(ddof=1))
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * within
    if many >= LEAST_ORDERS:
        half = max(half, student_t(many - 1) * sd / np.sqrt(many))
    low, high, bounds = values.mean() - half, values.mean() + half, draws[0].bounds
    if bounds is not None:
        low, high = max(bounds[0], low), min(bounds[1], high)
        if half < 1e-6:
            low, high = widen(values.mean(), sum(d.clusters for d in draws), bounds)
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": sum(d.n for d in draws), "sd": sd}


def mean_and_range(entries: Sequence[Interval], orders: int) -> Interval:
    """Mean over the orders that have a value, with the lowest and the highest end; `orders` counts them where some have none."""
    values = [float(e["value"] or 0.0) for e in entries]
    lows, highs = ([float(end) for e in entries if (end := e[k]) is not None] for k in ("low", "high"))
    low, high = (pick(ends) if len(ends) == len(entries) else None for pick, ends in ((min, lows), (max, highs)))
    out: Interval = {"value": float(np.mean(values)), "low": low, "high": high, "n": sum(int(e["n"] or 0) for e in entries)}
    if len(entries) < orders:
        out["orders"] = len(entries)
    return out | {"sd": float(np.std(values, ddof=1))} if len(values) > 1 else out


def student_t(freedom: int) -> float:
    """97.5 % point of Student's t."""
    return float(t.ppf((1 + LEVEL) / 2, freedom))


def notes(runs: Sequence[Run]) -> list[str]:
    """Notes on what the intervals cover, and on differences between the orders."""
    if len(runs) == 1:
        return ["one order of the stream: intervals cover the choice of subjects, not another order or seed"]
    seeds = ", ".join(str(r.manifest.get("seed", "?")) for r in runs)
    covered = "subjects and orders" if len(runs) >= LEAST_ORDERS else f"subjects only (orders: from {LEAST_ORDERS} on)"
    out = [f"{len(runs)} orders of the stream (seeds {seeds}): values are means over orders, intervals cover {covered}"]
    commits = {str(r.manifest.get("git", "?")) for r in runs}
    return out + ([f"the orders were run by different versions of the code: {', '.join(sorted(commits))}"] if len(commits) > 1 else [])


def _with_editors(run: Run, names: Sequence[str]) -> Run:
    """The run with these editors alone; a note says which others were left out."""
    editors = {n: e for n, e in run.editors.items() if n in names}
    left = [f"{n}: not in every order, left out" for n in run.editors if n not in names]
    return replace(run, editors=editors, notes=run.notes + left)


def _require_orders(a: Run, b: Run) -> None:
    ours, theirs = a.manifest, b.manifest
    if ours.get("seed") == theirs.get("seed"):
        raise BadRun(f"{a.folders[0]} and {b.folders[0]} follow different schedules and cannot be compared ({differing(ours, theirs)})")
    ours, theirs = _settings(ours), _settings(theirs)
    if ours != theirs:
        both = f"{a.folders[0]} and {b.folders[0]}"
        raise BadRun(f"{both} differ in more than their seed, so they are not orders of one stream ({differing(ours, theirs)})")


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    config = {k: v for k, v in (manifest.get("config") or {}).items() if k not in _FREE}
    return config | {k: manifest.get(k) for k in _SAME} | {"stream": (manifest.get("stream") or {}).get("name")}
