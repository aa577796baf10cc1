"""Cluster bootstrap of weighted ratios, as one product of a multinomial weight matrix with cluster sums.

Answers that share a subject, a picture or a question are correlated, so the bootstrap resamples clusters of them
(`analysis.reading.clusters`) and not answers. One matrix serves all metrics and all editors of a run, so differences between
editors are paired by construction. An interval is built from the standard error over the replicates, because percentiles of
few clusters are too narrow.
Sources: Efron and Tibshirani 1993, ch. 6; Wilson 1927 (shares); Bonett and Price 2012 (differences); Korn and Graubard 1998
(effective sample sizes); Satterthwaite 1946 (degrees of freedom).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t

REPLICATES = 2000
MOST_GROUPS = 4096
"""Above this number, clusters are pooled at random into so many groups, which bounds memory and keeps the bootstrap valid."""
LEVEL = 0.95
LEAST_QUESTIONS = 10
"""Fewer distinct questions than this get no interval: they are a handful of cases, not a sample."""
_Z2 = 1.959963984540054**2
_TINY = 1e-6

Bounds = tuple[float, float] | None
Interval = dict[str, float | int | None]


@dataclass(frozen=True)
class Draws:
    """A statistic and its bootstrap replicates.

    values: (1 + replicates,) float; the first is the statistic on the data. n: number of answers behind it. asked: ids of the
    distinct questions among them. clusters: Kish's effective number of independent clusters. bounds: the range of possible
    values. fewest: distinct questions of the part that has the fewest, for a statistic of several parts. carrying: effective
    number of clusters that carry the standard error (after Satterthwaite), which a few large ones make small.
    """

    values: np.ndarray
    n: int
    asked: np.ndarray
    clusters: float
    bounds: Bounds = (0.0, 1.0)
    fewest: int | None = None
    carrying: float | None = None

    @property
    def value(self) -> float:
        return float(self.values[0])

    def interval(self) -> Interval:
        """{value, low, high, n, questions} with a 95 % interval; an infinite value or end, or an absent interval, is None."""
        fewest = len(self.asked) if self.fewest is None else self.fewest
        ends = self._ends() if fewest >= LEAST_QUESTIONS else (np.nan, np.nan)
        value, low, high = (float(v) if np.isfinite(v) else None for v in (self.value, *ends))
        return {"value": value, "low": low, "high": high, "n": self.n, "questions": len(self.asked)}

    def _ends(self) -> tuple[float, float]:
        """Ends of the interval: Wilson's for a share, Bonett and Price's for a difference, Student's of the logarithm for a ratio."""
        kept = self.values[~np.isnan(self.values)]
        if not np.isfinite(kept).all() or len(kept) < 2:
            return percentile(self.values[1:])
        if self.bounds is None and (kept > 0).all():
            half = self._half_width(np.log(kept))
            return self.value * float(np.exp(-half)), self.value * float(np.exp(half))
        if self.bounds is not None and np.ptp(kept) <= _TINY:
            return widen(self.value, self.clusters, self.bounds)
        half = self._half_width(kept)
        if self.bounds == (0.0, 1.0) and 0 < self.value < 1:
            return wilson(self.value, half)
        if self.bounds == (-1.0, 1.0):
            return bonett_price(self.value, half, self._times(), self.clusters)
        least, most = self.bounds or (-np.inf, np.inf)
        return max(least, self.value - half), min(most, self.value + half)

    def _half_width(self, values: np.ndarray) -> float:
        """Student's t times the standard error over the replicates, whose square is (m - 1) / m too small for m clusters."""
        return float(self._times() * np.std(values[1:]) * np.sqrt(self.clusters / max(1.0, self.clusters - 1)))

    def _times(self) -> float:
        """Student's t for the clusters that carry the standard error."""
        return float(t.ppf((1 + LEVEL) / 2, max(1.0, (self.carrying or self.clusters) - 1)))

    def __sub__(self, other: Draws) -> Draws:
        """Paired difference; the difference of two proportions lies in [-1, 1]."""
        bounds = None
        if self.bounds is not None and other.bounds is not None:
            bounds = (self.bounds[0] - other.bounds[1], self.bounds[1] - other.bounds[0])
        return combine(np.subtract, self, other, bounds=bounds, paired=True)


def combine(function: Callable[..., np.ndarray], *draws: Draws, bounds: Bounds = (0.0, 1.0), paired: bool = False) -> Draws:
    """A function of several statistics of the same replicates.

    n counts the answers to all parts, or those of one where the parts are sides of the same answers (paired). The
    interval is that of the part with the fewest clusters and the fewest distinct questions.
    """
    counts = [d.n for d in draws]
    asked = np.unique(np.concatenate([d.asked for d in draws]))
    fewest = min(len(d.asked) if d.fewest is None else d.fewest for d in draws)
    n = min(counts) if paired else sum(counts)
    carrying = min(d.carrying or d.clusters for d in draws)
    return Draws(function(*(d.values for d in draws)), n, asked, min(d.clusters for d in draws), bounds, fewest, carrying)


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


def never_within(checkpoints: int) -> Interval:
    """The entry of an event that did not happen at any of the checkpoints at which it was looked for."""
    return {"value": None, "low": None, "high": None, "n": checkpoints}


def percentile(replicates: np.ndarray) -> tuple[float, float]:
    """Ends of the central 95 % of the replicates that are not nan; (nan, nan) where all are."""
    kept = replicates[~np.isnan(replicates)]
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.quantile(kept, ((1 - LEVEL) / 2, 1 - (1 - LEVEL) / 2), method="closest_observation")
    return float(low), float(high)


def wilson(share: float, half: float) -> tuple[float, float]:
    """Wilson's score interval of a share in (0, 1), from half the width of the symmetric interval of the same level."""
    spread = share * (1 - share)
    square = half**2 / spread
    root = np.sqrt(square * (spread + square / 4))
    return float((share + square / 2 - root) / (1 + square)), float((share + square / 2 + root) / (1 + square))


def bonett_price(difference: float, half: float, times: float, clusters: float) -> tuple[float, float]:
    """The interval of a paired difference of shares after Bonett and Price (2012): one discordant pair more each way.

    half: half the width of the symmetric interval, `times` standard errors. The number of pairs is the geometric mean of the
    number of clusters and of that of independent pairs, all discordant the same way, with this standard error.
    """
    error = half / times
    pairs = np.sqrt(clusters * max(clusters, (abs(difference) - difference**2) / error**2))
    size = pairs + 2
    centre, discordant = difference * pairs / size, ((error**2 * pairs + difference**2) * pairs + 2) / size
    half = times * np.sqrt(max(0.0, discordant - centre**2) / size)
    return max(-1.0, float(centre - half)), min(1.0, float(centre + half))


def widen(value: float, clusters: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """The interval where all replicates agree: value -+ z^2 / (n + z^2), clipped to the bounds.

    For a proportion of 0 or 1 this is exactly Wilson's score interval with n clusters; for a difference of 0
    it bounds the share of discordant pairs in the same way.
    """
    half = _Z2 / (clusters + _Z2)
    return max(bounds[0], value - half), min(bounds[1], value + half)


class Resampler:
    """Resamples clusters 0..clusters-1 with replacement, `replicates` times.

    The frames of answers that its methods take have the columns cluster and asked (id of the distinct question).
    """

    def __init__(self, clusters: int, rng: np.random.Generator, replicates: int = REPLICATES) -> None:
        groups = max(1, min(clusters, MOST_GROUPS))
        self.clusters = max(1, clusters)
        self.replicates = replicates
        self._groups = groups
        self._group_of = rng.permutation(self.clusters) % groups
        drawn = rng.integers(0, groups, (replicates, groups)) + np.arange(replicates)[:, None] * groups
        self._weights = np.bincount(drawn.ravel(), minlength=replicates * groups).reshape(replicates, groups).astype(np.float32)

    def ratios(self, rows: pd.DataFrame, top: np.ndarray, bottom: np.ndarray) -> list[Draws | None]:
        """sum(top) / sum(bottom) of each column with replicates; None for a column whose denominators are all 0.

        top, bottom: (answers, statistics) float.
        """
        many = top.shape[1]
        cell = np.tile(np.arange(many), len(rows))
        return self.cells(rows[["cluster", "asked"]].iloc[np.repeat(np.arange(len(rows)), many)], top.ravel(), bottom.ravel(), cell, many)

    def means(self, rows: pd.DataFrame, weight: np.ndarray, scores: np.ndarray) -> list[Draws | None]:
        """Hajek means sum(w y) / sum(w) of the columns of `scores` (answers, statistics); nan marks an answer that was not measured."""
        seen = ~np.isnan(scores)
        bottom = seen * weight[:, None]
        return self.ratios(rows, np.where(seen, scores, 0.0) * weight[:, None], bottom)

    def cells(self, rows: pd.DataFrame, top: np.ndarray, bottom: np.ndarray, cell: np.ndarray, count: int) -> list[Draws | None]:
        """sum(top) / sum(bottom) within each of `count` cells; None for an empty cell. top, bottom, cell: (answers,)."""
        cluster, asked = rows["cluster"].to_numpy(), rows["asked"].to_numpy()
        slot = self._group_of[cluster] * count + cell
        sums = [np.bincount(slot, x, self._groups * count).reshape(self._groups, count) for x in (top, bottom)]
        full = np.flatnonzero(sums[1].any(axis=0))
        values = np.full((self.replicates + 1, count), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            values[0] = np.bincount(cell, top, count) / np.bincount(cell, bottom, count)
            above, below = ((self._weights @ x[:, full].astype(np.float32)).astype(float) for x in sums)
            values[1:, full] = above / below
        order = np.argsort(np.where(bottom != 0, cell, count), kind="stable")
        ends = np.cumsum(np.bincount(cell[bottom != 0], minlength=count))
        parts = np.split(order, ends)[:count]
        return [_draws(values[:, j], cluster[own], asked[own], bottom[own]) if len(own) else None for j, own in enumerate(parts)]


def _draws(values: np.ndarray, cluster: np.ndarray, asked: np.ndarray, weight: np.ndarray) -> Draws:
    mass = np.bincount(pd.factorize(cluster)[0], weight)
    squares = mass**2
    kish, carrying = mass.sum() ** 2 / squares.sum(), squares.sum() ** 2 / (squares**2).sum()
    return Draws(values, len(weight), np.unique(asked), float(kish), carrying=float(carrying))
