"""What a figure is drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import style
from analysis.metrics import curves, retrieval
from analysis.metrics.bootstrap import Resampler
from analysis.metrics.catalogue import READING_TITLES, SUFFIXES
from analysis.reading.load import READINGS, EditorRun, Run

Curve = Callable[[Run, EditorRun, Resampler], pd.DataFrame]
"""An editor's curve in one order: columns x, value, low, high, n."""


@dataclass(frozen=True)
class Scene:
    """The orders of a run, their summary, a bootstrap each, the looks, the reading of "right", and the page's columns."""

    runs: tuple[Run, ...]
    summary: dict[str, Any]
    resamplers: tuple[Resampler, ...]
    looks: style.Looks
    reading: str
    columns: int = 2

    @property
    def run(self) -> Run:
        """The first order."""
        return self.runs[0]

    @property
    def resampler(self) -> Resampler:
        return self.resamplers[0]

    @property
    def suffix(self) -> str:
        return SUFFIXES[READINGS.index(self.reading)]

    @property
    def reading_title(self) -> str:
        return READING_TITLES[self.suffix]

    @property
    def time_label(self) -> str:
        return style.TIME_LABELS.get(self.run.time_axis, "years")

    @cached_property
    def ledgers(self) -> pd.DataFrame:
        """The table of `analysis.metrics.retrieval`, read once for figure and file."""
        return retrieval.table(self.runs)

    @property
    def width(self) -> float:
        """Inches of the column or the page."""
        return style.WIDTHS[self.columns]

    def curves(self, curve: Curve) -> pd.DataFrame:
        """The curve of every editor, averaged over orders, in one frame with a column editor."""
        parts = []
        for name in self.run.editors:
            orders = [curve(r, r.editors[name], s) for r, s in zip(self.runs, self.resamplers)]
            parts.append(curves.average(orders).assign(editor=name))
        return pd.concat([p for p in parts if len(p)] or parts[:1], ignore_index=True)

    def panels(self, count: int, height: float, most: int = 3, **kwargs: Any) -> tuple[Figure, list[Axes], int]:
        """A figure of `count` panels in rows of at most `most` (a column's width: 2, or 1 below three panels), and
        the number of panels in a row."""
        across = min(most, count) if self.columns > 1 else (2 if count > 3 else 1)
        across = 2 if count == 4 and across == 3 else across
        rows = -(-count // across)
        figure, axes = style.panels(rows, across, height, self.width, **kwargs)
        for ax in axes[count:]:
            figure.delaxes(ax)
        return figure, axes[:count], across


def scene(runs: Run | Sequence[Run], summary: dict[str, Any], seed: int = 0, replicates: int = 1000, columns: int = 2) -> Scene:
    """Free generation is what the figures show, token accuracy where nothing was generated."""
    runs = (runs,) if isinstance(runs, Run) else tuple(runs)
    generated = any("edit_success_gen" in m or "edit_success_now_gen" in m for m in summary["editors"].values())
    resamplers = tuple(Resampler(r.clusters, np.random.default_rng(seed), replicates) for r in runs)
    return Scene(runs, summary, resamplers, style.looks(list(runs[0].editors)), "gen" if generated else "tf", columns)
