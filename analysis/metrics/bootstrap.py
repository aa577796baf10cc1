"""Cluster bootstrap of weighted ratios, as one product of a multinomial weight matrix with cluster sums.

Answers about one subject are correlated, so the bootstrap resamples whole subjects and not answers. One matrix serves
all metrics and all editors of a run, so differences between editors are paired by construction.
Sources: Efron and Tibshirani 1993, ch. 6 and 13 (percentile interval); Wilson 1927 (score interval).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

REPLICATES = 2000
MOST_GROUPS = 4096
"""Above this number, clusters are pooled at random into so many groups, which bounds memory and keeps the bootstrap valid."""
LEVEL = 0.95
_Z2 = 1.959963984540054**2
_TINY = 1e-6

Bounds = tuple[float, float] | None
Interval = dict[str, float | int | None]


@dataclass(frozen=True)
class Draws:
    """A statistic and its bootstrap replicates.

    values: (1 + replicates,) float; the first is the statistic on the data. n: number of answers behind it. clusters:
    Kish's effective number of independent clusters. bounds: the range of possible values.
    """

    values: np.ndarray
    n: int
    clusters: float
    bounds: Bounds = (0.0, 1.0)

    @property
    def value(self) -> float:
        return float(self.values[0])

    def interval(self) -> Interval:
        """{value, low, high, n} with the ends of the 95 % percentile interval; an infinite end is None."""
        low, high = percentile(self.values[1:])
        if self.bounds is not None and not high - low > _TINY:
            low, high = widen(self.value, self.clusters, self.bounds)
        low, high = (end if np.isfinite(end) else None for end in (low, high))
        return {"value": self.value, "low": low, "high": high, "n": self.n}

    def __sub__(self, other: Draws) -> Draws:
        """Paired difference; the difference of two proportions lies in [-1, 1]."""
        bounds = None
        if self.bounds is not None and other.bounds is not None:
            bounds = (self.bounds[0] - other.bounds[1], self.bounds[1] - other.bounds[0])
        return combine(np.subtract, self, other, bounds=bounds)


def combine(function: Callable[..., np.ndarray], *draws: Draws, bounds: Bounds = (0.0, 1.0)) -> Draws:
    """A function of several statistics of the same replicates; n and clusters are the smallest among them."""
    values = function(*(d.values for d in draws))
    return Draws(values, min(d.n for d in draws), min(d.clusters for d in draws), bounds)


def mean(*values: np.ndarray) -> np.ndarray:
    """Arithmetic mean of several statistics, for `combine`."""
    return np.mean(values, axis=0)


def harmonic(*values: np.ndarray) -> np.ndarray:
    """Harmonic mean of several statistics, for `combine`; 0 where one of them is 0."""
    with np.errstate(divide="ignore"):
        return len(values) / np.sum([1 / v for v in values], axis=0)


def point(value: float, n: int) -> Interval:
    """An entry of summary.json without an interval."""
    return {"value": float(value), "low": None, "high": None, "n": n}


def percentile(replicates: np.ndarray) -> tuple[float, float]:
    """Ends of the central 95 % of the replicates that are not nan; (nan, nan) where all are."""
    kept = replicates[~np.isnan(replicates)]
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.quantile(kept, ((1 - LEVEL) / 2, 1 - (1 - LEVEL) / 2), method="closest_observation")
    return float(low), float(high)


def widen(value: float, clusters: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """The interval where all replicates agree: value -+ z^2 / (n + z^2), clipped to the bounds.

    For a proportion of 0 or 1 this is exactly Wilson's score interval with n clusters; for a difference of 0
    it bounds the share of discordant pairs in the same way.
    """
    half = _Z2 / (clusters + _Z2)
    return max(bounds[0], value - half), min(bounds[1], value + half)


class Resampler:
    """Resamples clusters 0..clusters-1 with replacement, `replicates` times."""

    def __init__(self, clusters: int, rng: np.random.Generator, replicates: int = REPLICATES) -> None:
        groups = max(1, min(clusters, MOST_GROUPS))
        self.clusters = max(1, clusters)
        self.replicates = replicates
        self._groups = groups
        self._group_of = rng.permutation(self.clusters) % groups
        drawn = rng.integers(0, groups, (replicates, groups)) + np.arange(replicates)[:, None] * groups
        self._weights = np.bincount(drawn.ravel(), minlength=replicates * groups).reshape(replicates, groups).astype(np.float32)

    def ratios(self, cluster: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> list[Draws | None]:
        """sum(top) / sum(bottom) of each column with replicates; None for a column whose denominators are all 0.

        cluster: (answers,) int; top, bottom: (answers, statistics) float.
        """
        many = top.shape[1]
        return self.cells(cluster.repeat(many), top.ravel(), bottom.ravel(), np.tile(np.arange(many), len(cluster)), many)

    def means(self, cluster: np.ndarray, weight: np.ndarray, scores: np.ndarray) -> list[Draws | None]:
        """Hajek means sum(w y) / sum(w) of the columns of `scores` (answers, statistics); nan marks an answer that was not measured."""
        seen = ~np.isnan(scores)
        bottom = seen * weight[:, None]
        return self.ratios(cluster, np.where(seen, scores, 0.0) * weight[:, None], bottom)

    def cells(self, cluster: np.ndarray, top: np.ndarray, bottom: np.ndarray, cell: np.ndarray, count: int) -> list[Draws | None]:
        """sum(top) / sum(bottom) within each of `count` cells; None for an empty cell. cluster, top, bottom, cell: (answers,)."""
        slot = self._group_of[cluster] * count + cell
        sums = [np.bincount(slot, x, self._groups * count).reshape(self._groups, count) for x in (top, bottom)]
        full = np.flatnonzero(sums[1].any(axis=0))
        values = np.full((self.replicates + 1, count), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            values[0] = np.bincount(cell, top, count) / np.bincount(cell, bottom, count)
            above, below = ((self._weights @ x[:, full].astype(np.float32)).astype(float) for x in sums)
            values[1:, full] = above / below
        return [self._draws(values[:, j], cluster[cell == j], bottom[cell == j]) for j in range(count)]

    def _draws(self, values: np.ndarray, cluster: np.ndarray, bottom: np.ndarray) -> Draws | None:
        used = int(np.count_nonzero(bottom))
        if not used:
            return None
        mass = np.bincount(cluster, bottom, self.clusters)
        return Draws(values, used, float(mass.sum() ** 2 / (mass**2).sum()))
