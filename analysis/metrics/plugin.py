"""Metrics by registration, of the testbed and of plug-ins: the weighted mean of a number for each answer that a metric chooses.

Such a metric gets what the metrics of the testbed have: intervals over clusters, paired differences between editors, means
over orders, and its row in summary.json, the tables and the report. docs/add-a-metric.md leads through one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pandas as pd

from analysis.metrics.answers import SHARE, SIGNED, Metrics, at_end, means
from analysis.metrics.bootstrap import Resampler
from analysis.metrics.catalogue import Unit
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import SCORES, stored_texts
from testbed.core.registry import METRICS

_BOUNDS: dict[str, tuple[float, float]] = {"share": SHARE, "difference": SIGNED}


class AnswerMetric(ABC):
    """The contract of a metric of one's own; register a subclass with `@METRICS.register("name")`.

    summary, short: long and short title. unit: share and difference are shown in per cent and lie in [0, 1] and [-1, 1]; the
    others are ratio, bits, count, edits, seconds and bytes. better: 1 where larger values are better, -1 where smaller ones are, 0
    where neither is. modes: true where `values` gives a column for each scoring mode. main: true for a row in the main table.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    short: ClassVar[str]
    unit: ClassVar[Unit] = "share"
    better: ClassVar[int] = 0
    modes: ClassVar[bool] = False
    main: ClassVar[bool] = False

    @abstractmethod
    def answers(self, run: Run, editor: EditorRun) -> pd.DataFrame:
        """The rows of `editor.records` that count (columns: see `EditorRun`); none where the metric has no value."""

    @abstractmethod
    def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
        """A number for each row, (rows,) float, or with `modes` (rows, scoring modes); nan where it was not measured."""


class SplitSuccess(AnswerMetric):
    """The mean score at the end of the answers of one split, in every scoring mode, in [0, 1]; absent where no probe asks it."""

    split: ClassVar[str]
    better = 1
    modes = True

    def answers(self, run: Run, editor: EditorRun) -> pd.DataFrame:
        return at_end(editor.records, self.split)

    def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
        return rows[SCORES].to_numpy(float)


def generated_texts(editor: EditorRun, rows: pd.DataFrame) -> list[str | None]:
    """The freely generated text of each row; None where only given answers were scored."""
    order = np.argsort(rows.index.to_numpy(), kind="stable")
    texts = stored_texts(editor.folder, rows.index.to_numpy()[order])["generated"].to_pylist()
    return [texts[i] for i in np.argsort(order, kind="stable")]


def plugin_metrics(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """The registered metrics of an editor. One that fails is left out with a note in `run.notes`, because a report of
    everything else is worth more than none after hours of work."""
    metrics: Metrics = {}
    for name, cls in METRICS.items():
        try:
            metrics |= _measured(cls(), run, editor, resampler)
        except ModuleNotFoundError as e:
            run.notes.append(f"{editor.name}: the metric {name} is absent: {e}")
        except Exception as e:
            why = f"{type(e).__name__}: {e}"
            run.notes.append(
                f"{editor.name}: the metric {name} failed and is left out ({why}); mend it, then testbed analyze --plugin FILE"
            )
    return metrics


def _measured(metric: AnswerMetric, run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    rows = metric.answers(run, editor)
    if rows.empty:
        return {}
    values = np.asarray(metric.values(run, editor, rows), float)
    shape = (len(rows), len(SCORES)) if metric.modes else (len(rows),)
    if values.shape != shape:
        raise ValueError(f"values() must return shape {shape} for {len(rows)} answers, found {values.shape}")
    if not metric.modes:
        values = np.column_stack([values, np.full((len(rows), len(SCORES) - 1), np.nan)])
    bounds = _BOUNDS.get(metric.unit)
    if bounds and ((values < bounds[0]) | (values > bounds[1])).any():
        raise ValueError(
            f"values of the unit {metric.unit} lie in [{bounds[0]:g}, {bounds[1]:g}], found {np.nanmin(values)} to {np.nanmax(values)}"
        )
    return {n: replace(d, bounds=bounds) for n, d in means(metric.name, rows, values, resampler).items()}
