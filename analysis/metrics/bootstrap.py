"""Cluster bootstrap of weighted ratios, as one product of a multinomial weight matrix with cluster sums.

Questions about one subject move together, so whole subjects are drawn again, not answers. One matrix serves
all metrics and all editors of a run: differences between editors are paired by construction.
Source: Efron and Tibshirani 1993, ch. 6 and 13 (percentile interval); Wilson 1927 (score interval).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

REPLICATES = 2000
MOST_GROUPS = 4096
"""More clusters than this are pooled at random into as many groups, which bounds memory and stays valid."""
LEVEL = 0.95
_Z2 = 1.959963984540054**2
_TINY = 1e-6

Bounds = tuple[float, float] | None
Interval = dict[str, float | int | None]


@dataclass(frozen=True)
class Draws:
    """A statistic and its bootstrap replicates.

    `values[0]` is the statistic on the data, the rest are the replicates; `n` counts the answers behind it,
    `clusters` is Kish's effective number of independent clusters, `bounds` is the range of possible values.
    """

    values: np.ndarray
    n: int
    clusters: float
    bounds: Bounds = (0.0, 1.0)

    @property
    def value(self) -> float:
        return float(self.values[0])

    def interval(self) -> Interval:
        """{value, low, high, n}: the 95 % percentile interval; an end that is infinite is None."""
        low, high = percentile(self.values[1:])
        if self.bounds is not None and not high - low > _TINY:
            low, high = widen(self.value, self.clusters, self.bounds)
        return {"value": self.value, "low": _finite(low), "high": _finite(high), "n": self.n}

    def __sub__(self, other: Draws) -> Draws:
        """Paired difference; of proportions it lies in [-1, 1]."""
        bounds = None
        if self.bounds is not None and other.bounds is not None:
            bounds = (self.bounds[0] - other.bounds[1], self.bounds[1] - other.bounds[0])
        return combine(np.subtract, self, other, bounds=bounds)


def combine(function: Callable[..., np.ndarray], *draws: Draws, bounds: Bounds = (0.0, 1.0)) -> Draws:
    """A function of several statistics of the same replicates; as sure as the least sure of them."""
    values = function(*(d.values for d in draws))
    return Draws(values, min(d.n for d in draws), min(d.clusters for d in draws), bounds)


def percentile(replicates: np.ndarray) -> tuple[float, float]:
    """Ends of the central 95 % of the replicates that are defined; (nan, nan) when none is."""
    kept = replicates[~np.isnan(replicates)]
    if not len(kept):
        return float("nan"), float("nan")
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(kept, (tail, 1 - tail), method="closest_observation")
    return float(low), float(high)


def widen(value: float, clusters: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """Interval where all replicates agree: value -+ z^2 / (n + z^2), clipped to the bounds.

    For a proportion of 0 or 1 this is exactly Wilson's score interval with n clusters; for a difference of 0
    it bounds the share of discordant pairs in the same way.
    """
    reach = _Z2 / (clusters + _Z2)
    return max(bounds[0], value - reach), min(bounds[1], value + reach)


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion."""
    if n <= 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + _Z2 / (2 * n)) / (1 + _Z2 / n)
    half = np.sqrt(_Z2 * (p * (1 - p) / n + _Z2 / (4 * n * n))) / (1 + _Z2 / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


class Resampler:
    """Draws clusters 0..clusters-1 again, with replacement, `replicates` times."""

    def __init__(self, clusters: int, rng: np.random.Generator, replicates: int = REPLICATES) -> None:
        groups = max(1, min(clusters, MOST_GROUPS))
        self.clusters = max(1, clusters)
        self.replicates = replicates
        self._groups = groups
        self._group_of = rng.permutation(self.clusters) % groups
        drawn = rng.integers(0, groups, (replicates, groups)) + np.arange(replicates)[:, None] * groups
        self._weights = np.bincount(drawn.ravel(), minlength=replicates * groups).reshape(replicates, groups).astype(np.float32)

    def ratios(self, cluster: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> list[Draws | None]:
        """Column by column sum(top) / sum(bottom) with replicates; None for a column with nothing under it.

        `cluster` has one entry a row, `top` and `bottom` one row an answer and one column a statistic.
        """
        columns = np.hstack([top, bottom])
        groups = self._group_of[cluster]
        sums = np.stack([np.bincount(groups, c, self._groups) for c in columns.T], axis=1)
        drawn = (self._weights @ sums.astype(np.float32)).astype(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            k = top.shape[1]
            values = np.vstack([columns[:, :k].sum(0) / columns[:, k:].sum(0), drawn[:, :k] / drawn[:, k:]])
        return [self._draws(values[:, j], cluster, bottom[:, j]) for j in range(k)]

    def means(self, cluster: np.ndarray, weight: np.ndarray, scores: np.ndarray) -> list[Draws | None]:
        """Hajek means sum(w y) / sum(w) of the columns of `scores`; nan is an answer that was not measured."""
        seen = ~np.isnan(scores)
        bottom = seen * weight[:, None]
        return self.ratios(cluster, np.where(seen, scores, 0.0) * weight[:, None], bottom)

    def cells(self, cluster: np.ndarray, top: np.ndarray, bottom: np.ndarray, cell: np.ndarray, count: int) -> list[Draws | None]:
        """sum(top) / sum(bottom) within each of `count` cells; None for a cell with nothing in it."""
        slot = self._group_of[cluster] * count + cell
        sums = [np.bincount(slot, x, self._groups * count).reshape(self._groups, count) for x in (top, bottom)]
        full = np.flatnonzero(sums[1].any(axis=0))
        values = np.full((self.replicates + 1, count), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            values[0] = sums[0].sum(0) / sums[1].sum(0)
            above, below = ((self._weights @ x[:, full].astype(np.float32)).astype(float) for x in sums)
            values[1:, full] = above / below
        return [self._draws(values[:, j], cluster[cell == j], bottom[cell == j]) for j in range(count)]

    def _draws(self, values: np.ndarray, cluster: np.ndarray, bottom: np.ndarray) -> Draws | None:
        used = int(np.count_nonzero(bottom))
        if not used:
            return None
        mass = np.bincount(cluster, bottom, self.clusters)
        return Draws(values, used, float(mass.sum() ** 2 / (mass**2).sum()))


def _finite(x: float) -> float | None:
    return x if np.isfinite(x) else None
