"""Tables of curves and topics: CSV with intervals, what the figures show in numbers."""

from __future__ import annotations

from functools import partial

import pandas as pd

from analysis.figures.context import Scene
from analysis.metrics import curves
from analysis.metrics.ability import topic_table
from analysis.metrics.catalogue import READING_TITLES
from analysis.reading.load import READINGS
from analysis.reporting import published


def files(s: Scene, kinds: tuple[str, ...]) -> dict[str, str]:
    """File name to content, for the kinds asked for ("csv", "latex")."""
    out = {}
    if "csv" in kinds:
        found = {
            "forgetting.csv": matrices(s),
            "topics.csv": topic_scores(s),
            "published.csv": pd.DataFrame(published.rows(s.run, s.summary)),
            "retrieval.csv": s.ledgers,
        }
        out = {name: frame.to_csv(index=False, lineterminator="\n") for name, frame in found.items() if len(frame)}
    return out


def matrices(s: Scene) -> pd.DataFrame:
    """Year by year success of every order, editor and reading: seed, editor, reading, made, asked, value, low, high, n."""
    parts = []
    for run, resampler in zip(s.runs, s.resamplers):
        for name, editor in run.editors.items():
            for reading, title in zip(READINGS, READING_TITLES.values()):
                table = partial(curves.matrix, reading=reading)(run, editor, resampler).rename(columns={"x": "asked"})
                parts.append(table.assign(seed=run.manifest.get("seed"), editor=name, reading=title))
    return _joined(parts)[["seed", "editor", "reading", "made", "asked", "value", "low", "high", "n"]]


def topic_scores(s: Scene) -> pd.DataFrame:
    """Score of every topic of general questions, benchmarks and safety sets at the end, beside the unedited model's."""
    parts = []
    for run, resampler in zip(s.runs, s.resamplers):
        parts += [topic_table(run, e, resampler).assign(seed=run.manifest.get("seed"), editor=n) for n, e in run.editors.items()]
    table = _joined(parts)
    table["reading"] = table["reading"].map(READING_TITLES)
    return table[["seed", "editor", "topic", "reading", "value", "low", "high", "n", "unedited", "chance"]]


def _joined(parts: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([p for p in parts if len(p)] or parts[:1], ignore_index=True)
