"""Several orders of one stream: runs that differ only in their seed, pooled and with the spread between them.

The order of a stream changes results more than the choice of questions does, so an interval from one order does not
cover another order. From three orders on, intervals cover both; two orders have none (see `mean_over_orders`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from analysis.metrics.bootstrap import LEVEL, Draws, Interval, combine, mean
from analysis.reading.load import Run, differing, load_run, side_by_side
from analysis.reading.records import BadRun

LEAST_ORDERS = 3
"""Fewest orders that have an interval."""
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
    """Mean over orders, with `sd`, the standard deviation between orders, and from three orders on an interval.

    Half the interval is Student's t (orders - 1 degrees of freedom) times sd / sqrt(orders), and no less than that of the
    subjects, which orders that agree by chance would hide. Two orders say too little of a third for an interval. A
    statistic with infinite replicates gets its range.
    """
    values = np.array([d.value for d in draws])
    if any(not np.isfinite(d.values).all() for d in draws) and draws[0].bounds is None:
        return mean_and_range([d.interval() for d in draws], len(draws))
    out = combine(mean, *draws, bounds=draws[0].bounds).interval()
    sd = float(values.std(ddof=1))
    if len(draws) < LEAST_ORDERS or out["low"] is None or out["high"] is None:
        return out | {"low": None, "high": None, "sd": sd}
    half = half_width(sd, len(draws))
    least, most = draws[0].bounds or (-np.inf, np.inf)
    low, high = min(out["low"], max(least, values.mean() - half)), max(out["high"], min(most, values.mean() + half))
    return out | {"low": float(low), "high": float(high), "sd": sd}


def over_orders(entries: Sequence[Interval], bounds: tuple[float, float]) -> Interval:
    """As `mean_over_orders`, from the entries of the orders' summaries, for runs whose answers are not at hand.

    The subjects' interval of the mean has the root of the summed squares of the orders' halves over their number as its half.
    """
    out, halves = mean_and_range(entries, len(entries)), [_half(e) for e in entries]
    if len(entries) < LEAST_ORDERS or None in halves or out["value"] is None:
        return out | {"low": None, "high": None}
    subjects = float(np.sqrt(sum(h**2 for h in halves if h is not None))) / len(entries)
    half = max(subjects, float(half_width(out.get("sd"), len(entries))))
    return out | {"low": max(bounds[0], out["value"] - half), "high": min(bounds[1], out["value"] + half)}


def _half(entry: Interval) -> float | None:
    """Half the width of an interval; None where there is none."""
    low, high = entry["low"], entry["high"]
    return None if entry["value"] is None or low is None or high is None else (high - low) / 2


def half_width(sd: Any, orders: int) -> Any:
    """Half of Student's interval of a mean over orders with a standard deviation between them (a number or an array)."""
    return t.ppf((1 + LEVEL) / 2, orders - 1) * sd / np.sqrt(orders)


def mean_and_range(entries: Sequence[Interval], orders: int) -> Interval:
    """Mean over the orders that have a value, with the lowest and the highest end; `orders` counts them where some have none.

    An event that happened in no order has no value.
    """
    happened = [e for e in entries if e["value"] is not None]
    if not happened:
        return entries[0] | {"n": sum(int(e["n"] or 0) for e in entries)}
    entries = happened
    values = [float(e["value"] or 0.0) for e in entries]
    lows, highs = ([float(end) for e in entries if (end := e[k]) is not None] for k in ("low", "high"))
    low, high = (pick(ends) if len(ends) == len(entries) else None for pick, ends in ((min, lows), (max, highs)))
    out: Interval = {"value": float(np.mean(values)), "low": low, "high": high, "n": sum(int(e["n"] or 0) for e in entries)}
    if "questions" in entries[0]:
        out["questions"] = max(int(e["questions"] or 0) for e in entries)
    if len(entries) < orders:
        out["orders"] = len(entries)
    return out | {"sd": float(np.std(values, ddof=1))} if len(values) > 1 else out


def notes(runs: Sequence[Run]) -> list[str]:
    """Notes on what the intervals cover, and on differences between the orders."""
    if len(runs) == 1:
        return ["one order of the stream: intervals are of this order only; they cover the choice of subjects, not another order or seed"]
    seeds = ", ".join(str(r.manifest.get("seed", "?")) for r in runs)
    few = f"there are no intervals, which need {LEAST_ORDERS} orders"
    covered = few if len(runs) < LEAST_ORDERS else "intervals cover subjects and orders"
    out = [f"{len(runs)} orders of the stream (seeds {seeds}): values are means over orders; {covered}"]
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
