"""Metrics as functions of stored answers: formulas, units and directions in docs/semantics.md.

Every mean is a Hajek mean, sum(w y) / sum(w) with w = 1 / inclusion probability. "At the end" is the last step
at which that kind of question was asked. What was not asked gives no metric.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from analysis.answers import age_bins, asked, at_end, immediate, in_common, pooled, right_after, unedited, year_ends
from analysis.bootstrap import REPLICATES, Draws, Interval, Resampler, combine
from analysis.catalogue import SUFFIXES, split_name
from analysis.collapse import collapse
from analysis.load import READINGS, EditorRun, Run

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
_SIGNED = (-1.0, 1.0)

Metrics = dict[str, Draws]


def summarise(run: Run, seed: int = 0, replicates: int = REPLICATES) -> dict[str, Any]:
    """Content of summary.json: run, editors, pairs. The bootstrap's draws depend on `seed` alone."""
    resampler = Resampler(run.clusters, np.random.default_rng(seed), replicates)
    measured = {name: measure(run, editor, resampler) for name, editor in run.editors.items()}
    editors = {name: _entries(m) | collapse(run, run.editors[name]) | cost(run.editors[name], seed) for name, m in measured.items()}
    pairs = {f"{a} - {b}": differences(run, (a, b), measured, resampler) for a, b in combinations(run.editors, 2)}
    return {"run": describe(run, editors), "editors": editors, "pairs": pairs}


def measure(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """All metrics that are functions of answers, with their replicates."""
    rows = editor.records
    out: Metrics = {}
    for name, split in AT_END.items():
        out |= _means(name, at_end(rows, split), resampler)
    out |= _means("edit_success_now", right_after(rows), resampler)
    out |= harmonic_mean(out)
    out |= forgetting(run, rows, resampler)
    out |= forgetting_max(run, rows, resampler)
    out |= forward_transfer(editor, resampler)
    out |= half_life(run, rows, resampler)
    out |= general_drop(editor, resampler) | perplexity_ratio(editor, resampler)
    return {name: d for name, d in out.items() if np.isfinite(d.value)}


def harmonic_mean(known: Metrics) -> Metrics:
    """3 / (1/text_generality + 1/image_generality + 1/locality_hard); 0 where one of them is 0."""
    out = {}
    for suffix in SUFFIXES:
        parts = [known[n + suffix] for n in HARMONIC if n + suffix in known]
        if len(parts) == len(HARMONIC):
            out["harmonic_mean" + suffix] = combine(_harmonic, *parts)
    return out


def forgetting(run: Run, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """F = mean(y_right_after - y_end) over live edits made before the last step; backward transfer is -F.

    Lopez-Paz and Ranzato 2017 (backward transfer), first-minus-last as in Avalanche. In [-1, 1].
    """
    end = at_end(rows, "edit")
    end = end[end["made"] < end["step"]]
    lost = immediate(run, rows)[end["edit"]] - end[list(READINGS)].to_numpy()
    return _named("forgetting", end, lost, resampler, _SIGNED) | _named("backward_transfer", end, -lost, resampler, _SIGNED)


def forgetting_max(run: Run, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """Mean over year cohorts k of max_l A(k, l) - A(k, T), l the year ends before T (Chaudhry et al. 2018).

    A(k, l) - A(k, T) is taken over the edits of year k that are live at T and were asked at both. In [-1, 1].
    """
    end = at_end(rows, "edit")
    last = np.full((len(run.events), len(READINGS)), np.nan)
    last[end["edit"]] = end[list(READINGS)]
    before = year_ends(asked(rows, "edit"))
    before = before[before["step"] < end["step"].max()]
    if before.empty:
        return {}
    cohorts, row = np.unique(np.floor(run.events["time"].to_numpy()[before["edit"]]), return_inverse=True)
    steps, column = np.unique(before["step"].to_numpy(), return_inverse=True)
    out: Metrics = {}
    for j, suffix in enumerate(SUFFIXES):
        drop = before[READINGS[j]].to_numpy() - last[before["edit"], j]
        table = pooled(before, drop, row * len(steps) + column, len(cohorts) * len(steps), resampler)
        best = _mean_of_best(table, len(steps))
        if best is not None:
            out["forgetting_max" + suffix] = best
    return out


def forward_transfer(editor: EditorRun, resampler: Resampler) -> Metrics:
    """Mean over edits asked before they were made of y_before - y_unedited (the last such answer). In [-1, 1]."""
    rows = editor.records
    early = rows[(rows["split"] == "edit") & (rows["edit"] >= 0) & (rows["made"] > rows["step"]) & (rows["step"] > 0)]
    early = early.sort_values("step").drop_duplicates("edit", keep="last")
    gain = early[list(READINGS)].to_numpy() - unedited(editor, early)
    return _named("forward_transfer", early, gain, resampler, _SIGNED)


def half_life(run: Run, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """First age (edits applied since) at which success given success right after is under 1/2; in edits.

    Ages fall into bins [2^k, 2^(k+1)); the age of a bin is the weighted geometric mean of its ages.
    """
    known = asked(rows, "edit")
    known = known[known["age"] > 0]
    first = immediate(run, rows)[known["edit"]]
    out: Metrics = {}
    for j, suffix in enumerate(SUFFIXES):
        held = known[first[:, j] == 1]
        ages, bins = age_bins(held, READINGS[j], resampler)
        draws = _first_under(ages, bins, 0.5)
        if draws is not None:
            out["half_life" + suffix] = draws
    return out


def general_drop(editor: EditorRun, resampler: Resampler) -> Metrics:
    """Mean over general questions at the end of y_unedited - y. In [-1, 1]; 0 is intact."""
    end = at_end(editor.records, "general")
    return _named("general_drop", end, unedited(editor, end) - end[list(READINGS)].to_numpy(), resampler, _SIGNED)


def perplexity_ratio(editor: EditorRun, resampler: Resampler) -> Metrics:
    """exp(NLL/token of running text at the end - NLL/token of the unedited model on the same texts); 1 is intact."""
    end = at_end(editor.records, "text")
    base = editor.base.iloc[end["question"]]
    both = (end["logprob"].notna().to_numpy()) & (base["logprob"].notna().to_numpy())
    end, base = end[both], base[both]
    if end.empty or np.isinf(end["logprob"]).any():
        return {}
    weight = end["weight"].to_numpy()[:, None]
    top = -np.column_stack([end["logprob"], base["logprob"]]) * weight
    bottom = np.column_stack([end["n_tokens"], base["n_tokens"]]) * weight
    now, before = resampler.ratios(end["cluster"].to_numpy(), top, bottom)
    if now is None or before is None:
        return {}
    return {"perplexity_ratio": combine(lambda a, b: np.exp(a - b), now, before, bounds=None)}


def differences(run: Run, names: tuple[str, str], measured: dict[str, Metrics], resampler: Resampler) -> dict[str, Interval]:
    """Metric of the first minus metric of the second, on the questions that both answered at the same step."""
    ours, theirs = (run.editors[n] for n in names)
    a, b = in_common(ours.records, theirs.records)
    first = measured[names[0]] if a is ours.records else measure(run, _with_records(ours, a), resampler)
    second = measured[names[1]] if b is theirs.records else measure(run, _with_records(theirs, b), resampler)
    shared = [m for m in first if m in second and split_name(m)[0] != "half_life"]
    return {m: (first[m] - second[m]).interval() for m in shared}


def cost(editor: EditorRun, seed: int) -> dict[str, Interval]:
    """edits, seconds_per_edit, state_bytes (after the last step) and peak_bytes (largest), from edits.jsonl."""
    steps = editor.reports
    if steps.empty:
        return {}
    given = steps["event_ids"].map(len).to_numpy()
    left = (steps["failed"].map(_size) + steps["skipped"].map(_size)).to_numpy()
    out: dict[str, Interval] = {"edits": _number(given.sum() - left.sum(), int(given.sum()))}
    draw = Resampler(len(steps), np.random.default_rng(seed))
    seconds = draw.ratios(np.arange(len(steps)), steps[["seconds"]].to_numpy(float), given[:, None].astype(float))[0]
    if seconds is not None:
        out["seconds_per_edit"] = Draws(seconds.values, int(given.sum()), seconds.clusters, None).interval()
    out["state_bytes"] = _number(steps["state_bytes"].iloc[-1], len(steps))
    out["peak_bytes"] = _number(steps["peak_bytes"].max(), len(steps))
    return out


def describe(run: Run, editors: dict[str, dict[str, Interval]]) -> dict[str, Any]:
    """The manifest, what was read, and notes about what was not measured or not done."""
    notes = list(run.notes)
    for name, entries in editors.items():
        absent = [m for m in [*AT_END, "edit_success_now", "perplexity_ratio"] if m not in entries]
        notes += [f"{name}: not measured: {', '.join(absent)}"] if absent else []
    last = {name: int(e.records["step"].max()) for name, e in run.editors.items()}
    left = {name: left_out(e) for name, e in run.editors.items()}
    return run.manifest | {"notes": notes, "planned_step": run.planned_step, "last_step": last, "not_applied": left}


def left_out(editor: EditorRun) -> dict[str, dict[str, int]]:
    """How many edits failed or were skipped, by reason."""
    return {kind: _reasons(editor.reports[kind]) for kind in ("failed", "skipped")}


def _reasons(column: pd.Series) -> dict[str, int]:
    found = [reason for entry in column if isinstance(entry, dict) for reason in entry.values()]
    return {str(k): int(v) for k, v in pd.Series(found, dtype=object).value_counts().items()}


def _entries(measured: Metrics) -> dict[str, Interval]:
    return {name: draws.interval() for name, draws in measured.items()}


def _means(name: str, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    return _named(name, rows, rows[list(READINGS)].to_numpy(), resampler)


def _named(name: str, rows: pd.DataFrame, scores: np.ndarray, resampler: Resampler, bounds: tuple[float, float] = (0.0, 1.0)) -> Metrics:
    if rows.empty:
        return {}
    draws = resampler.means(rows["cluster"].to_numpy(), rows["weight"].to_numpy(), scores)
    return {name + s: Draws(d.values, d.n, d.clusters, bounds) for s, d in zip(SUFFIXES, draws) if d is not None}


def _mean_of_best(cells: list[Draws | None], width: int) -> Draws | None:
    """Mean over rows of a table of drops of the largest drop of the row; rows without any are left out."""
    rows = [[d for d in cells[start : start + width] if d is not None] for start in range(0, len(cells), width)]
    rows = [r for r in rows if r]
    if not rows:
        return None
    best = np.stack([np.fmax.reduce([d.values for d in r]) for r in rows])
    known = ~np.isnan(best)
    with np.errstate(invalid="ignore"):
        mean = np.where(known, best, 0).sum(0) / known.sum(0)
    return Draws(mean, sum(max(d.n for d in r) for r in rows), sum(max(d.clusters for d in r) for r in rows), _SIGNED)


def _first_under(ages: np.ndarray, bins: list[Draws], limit: float) -> Draws | None:
    """Where the curve first passes under the limit, between two bins by a straight line over log age."""
    if not bins:
        return None
    scores, logs = np.stack([d.values for d in bins]), np.log(ages)
    under = scores < limit
    at = under.argmax(0)
    back = np.maximum(at - 1, 0)
    here, there = np.take_along_axis(scores, at[None], 0)[0], np.take_along_axis(scores, back[None], 0)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(at > 0, (there - limit) / (there - here), 1.0)
    values = np.where(under.any(0), np.exp(logs[back] + share * (logs[at] - logs[back])), np.inf)
    return Draws(values, sum(d.n for d in bins), min(d.clusters for d in bins), None)


def _harmonic(*parts: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return len(parts) / np.sum([1 / p for p in parts], axis=0)


def _with_records(editor: EditorRun, records: pd.DataFrame) -> EditorRun:
    return EditorRun(editor.name, editor.folder, records, editor.reports, editor.base)


def _size(entry: Any) -> int:
    return len(entry) if isinstance(entry, dict) else 0


def _number(value: float, n: int) -> Interval:
    return {"value": float(value), "low": None, "high": None, "n": n}
