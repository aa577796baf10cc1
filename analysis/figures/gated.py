"""The figure of editors that gate: what their entries reach and spare as they grow in number, and what they weigh.

An editor is gated when its reports count entries and its answers say which entry gave them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.figures import style
from analysis.figures.context import Scene
from analysis.metrics import curves
from analysis.metrics.answers import Metrics, asked, pooled
from analysis.metrics.bootstrap import Draws, Resampler
from analysis.metrics.catalogue import SUFFIXES, human_bytes
from analysis.metrics.deferral import decisions
from analysis.metrics.summary import harmonic_mean
from analysis.reading.load import READINGS, EditorRun, Run

_SCORED = {"text_generality": "Text generality", "image_generality": "Image generality", "locality_hard": "Locality: other picture"}
_REPHRASED = ("text_generality", "image_generality")


def gated(s: Scene) -> Figure | None:
    """Generality, hard locality and their harmonic mean by edits applied; beside them how often an entry fires, entries, bytes."""
    frames = {t: s.curves(partial(_by_edits, split=k, reading=s.reading)) for k, t in _SCORED.items()}
    frames["Harmonic mean"] = s.curves(partial(_harmonic_by_edits, reading=s.reading))
    sizes = {"Hit rate: rephrased": s.curves(partial(fires, spared=False))}
    sizes["Hit rate: locality"] = s.curves(partial(fires, spared=True))
    sizes["Entries"] = s.curves(_entries)
    sizes["State"] = s.curves(_bytes)
    if not len(sizes["Entries"]):
        return None
    figure, axes, across = s.panels(len(frames) + len(sizes), 1.9, most=4)
    for i, (ax, (title, frame)) in enumerate(zip(axes, {**frames, **sizes}.items())):
        if len(frame):
            style.lines(ax, frame, s.looks)
        ax.set_title(title)
        _upright(ax, title, s, first=i % across == 0)
        style.edits_axis(ax, "edits applied" if i + across >= len(axes) else "")
    style.legend(figure, s.looks)
    return style.finish(figure)


def _upright(ax: Axes, title: str, s: Scene, first: bool) -> None:
    if title in ("Entries", "State"):
        show: Callable[[float], str] = human_bytes if title == "State" else "{:,.0f}".format
        ax.set_ylim(bottom=0)
        ax.set_ylabel("")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: show(v)))
    elif title.startswith("Hit rate"):
        style.shares(ax, "share of questions" if first else "")
    else:
        style.shares(ax, f"right, or as unedited\n({s.reading_title})" if first else "")


def _by_edits(run: Run, editor: EditorRun, resampler: Resampler, split: str, reading: str) -> pd.DataFrame:
    """Score of a split by edits applied, at every checkpoint that asks it."""
    draws = _draws(editor, resampler, split, reading)
    return curves.table(run.edits_at(np.array(list(draws))), draws.values())


def _harmonic_by_edits(run: Run, editor: EditorRun, resampler: Resampler, reading: str) -> pd.DataFrame:
    suffix = SUFFIXES[READINGS.index(reading)]
    parts = {k: _draws(editor, resampler, k, reading) for k in _SCORED}
    steps = sorted(set.intersection(*(set(p) for p in parts.values())))
    known: list[Metrics] = [harmonic_mean({k + suffix: parts[k][step] for k in _SCORED}) for step in steps]
    return curves.table(run.edits_at(np.array(steps, int)), [m.get("harmonic_mean" + suffix) for m in known])


def _draws(editor: EditorRun, resampler: Resampler, split: str, reading: str) -> dict[int, Draws]:
    rows = asked(editor.records, split)
    steps, cell = np.unique(rows["step"].to_numpy(), return_inverse=True)
    found = pooled(rows, rows[reading].to_numpy(), cell, len(steps), resampler) if len(rows) else []
    return {int(step): d for step, d in zip(steps, found) if d is not None}


def fires(run: Run, editor: EditorRun, resampler: Resampler, spared: bool) -> pd.DataFrame:
    """Share of panel questions that an entry answered, by edits applied: rephrased, or (`spared`) of locality."""
    rows = decisions(editor)
    rows = rows[rows["split"].str.startswith("locality_") if spared else rows["split"].isin(_REPHRASED)]
    sums = rows.assign(hit=rows["fired"] * rows["weight"]).groupby("step")[["hit", "weight"]].sum()
    return _exact(run, sums.index.to_numpy(), sums["hit"].to_numpy() / sums["weight"].to_numpy())


def _entries(run: Run, editor: EditorRun, resampler: Resampler) -> pd.DataFrame:
    noted = [n.get("entries") if isinstance(n, dict) else None for n in editor.reports["notes"]]
    counts = pd.Series(noted, index=editor.reports["step"], dtype=float).dropna()
    return _exact(run, counts.index.to_numpy(), counts.to_numpy())


def _bytes(run: Run, editor: EditorRun, resampler: Resampler) -> pd.DataFrame:
    """Bytes of the state of an editor that counts entries."""
    if not len(_entries(run, editor, resampler)):
        return curves.table([], [])
    return _exact(run, editor.reports["step"].to_numpy(), editor.reports["state_bytes"].to_numpy(float))


def _exact(run: Run, steps: np.ndarray, values: np.ndarray) -> pd.DataFrame:
    """A curve of counted numbers, at most a hundred points of it; its band has no width."""
    keep = np.unique(np.linspace(0, len(steps) - 1, min(100, len(steps))).round().astype(int)) if len(steps) else np.zeros(0, int)
    x, y = run.edits_at(steps[keep].astype(int)), values[keep]
    return pd.DataFrame({"x": x, "value": y, "low": y, "high": y, "n": np.ones(len(y))}).astype(float)
