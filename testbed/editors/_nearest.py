"""Distances and nearest keys: one fp32 matrix product chooses candidates, exact differences judge them.

The product is never trusted beyond its rounding: where more keys than were measured exactly could still be
the nearest, the row is measured against all of them. So the answer is the brute-force one, whatever the
batch, the chunk or the device, and a key's distance to itself is exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["euclidean", "cosine"]
Rule = Literal["nearest-then-check", "containing-nearest"]
_CANDIDATES = 4
_ROUNDING = 2.0**-23
_CHUNK = 2**22
"""Numbers of one exact comparison held at once."""


def direct(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """(...,) float64 distances by direct differences along the last axis. Cosine of a zero vector counts as distance 1."""
    a, b = a.double(), b.double()
    if metric == "euclidean":
        return (a - b).square().sum(-1).sqrt()
    # half the squared chord: exactly zero for equal vectors, 1 - cosine otherwise
    chord = (unit(a) - unit(b)).square().sum(-1) / 2
    zero = (a.abs().amax(-1) == 0) | (b.abs().amax(-1) == 0)
    return torch.where(zero, torch.ones_like(chord), chord)


def to_all(keys: Tensor, key: Tensor, metric: Metric) -> Tensor:
    """(n,) float64 distances of one key (f,) to keys (n, f), a chunk at a time."""
    if not len(keys):
        return torch.zeros(0, dtype=torch.float64, device=keys.device)
    rows = max(1, _CHUNK // keys.shape[1])
    return torch.cat([direct(part, key, metric) for part in keys.split(rows)])


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


@dataclass(frozen=True)
class Found:
    """Per query: the row of the key that answers, or -1, and the float64 distance that was decisive.

    Nearest-then-check: the distance of the nearest key; containing-nearest: that of the answering key, inf for none.
    """

    row: Tensor
    distance: Tensor


class Nearest:
    """Keys (n, f) float32 with radii (n,) float64, made ready for search on one device; both stay as they are."""

    def __init__(self, keys: Tensor, radii: Tensor, metric: Metric = "euclidean", rule: Rule = "nearest-then-check") -> None:
        self.keys, self.radii = keys, radii
        self.metric: Metric = metric
        self.rule: Rule = rule
        self.centre = keys.double().mean(0).float() if metric == "euclidean" and len(keys) else torch.zeros_like(keys[:0].sum(0))
        self.points = self._point(keys)
        self.norms = self.points.square().sum(1)
        self.longest = float(self.norms.max().sqrt()) if len(keys) else 0.0

    def _point(self, x: Tensor) -> Tensor:
        """Vectors whose squared Euclidean distances order the keys (for cosine: twice the distance)."""
        return x - self.centre if self.metric == "euclidean" else unit(x.double()).float()

    def _square(self, distance: Tensor) -> Tensor:
        return distance.square() if self.metric == "euclidean" else 2 * distance

    def __call__(self, queries: Tensor) -> Found:
        """Search for queries (B, f) float32. A query that is not finite finds nothing."""
        finite = queries.isfinite().all(1)
        q = torch.where(finite[:, None], queries, 0.0)
        if not len(self.keys):
            return Found(torch.full_like(finite, -1, dtype=torch.long), torch.full_like(finite, torch.inf, dtype=torch.float64))
        near, sure = self._candidates(q)
        row, distance = self._judge(q, near)
        best = self._square(distance)
        for i in ((best >= sure) & sure.isfinite()).nonzero()[:, 0].tolist():
            row[i], distance[i] = self._brute(q[i])
        return Found(torch.where(finite, row, -1), torch.where(finite, distance, torch.inf))

    def _candidates(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """(B, k) candidate rows in ascending order, and (B,) a squared distance that all other keys certainly exceed."""
        x = self._point(q)
        own = x.square().sum(1, keepdim=True)
        part = torch.addmm(self.norms, x, self.points.T, alpha=-2)
        slack = (self.keys.shape[1] + 16) * _ROUNDING * (own.sqrt() + self.longest).square()
        if self.rule == "containing-nearest":
            part = part.masked_fill(part + own - slack > self._square(self.radii).float() * (1 + 4 * _ROUNDING), torch.inf)
        k = min(_CANDIDATES, len(self.keys))
        low = part.topk(k, largest=False)
        sure = (low.values[:, -1:] + own - slack)[:, 0].double() if k < len(self.keys) else torch.full_like(own[:, 0], torch.inf).double()
        return low.indices.sort(1).values, sure

    def _judge(self, q: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """The answering row and the decisive distance among candidate rows (B, k)."""
        d = direct(q.unsqueeze(1), self.keys[near], self.metric)
        inside = d <= self.radii[near]
        order = d if self.rule == "nearest-then-check" else torch.where(inside, d, torch.inf)
        best = order.argmin(1, keepdim=True)
        row = torch.where(inside.gather(1, best), near.gather(1, best), -1)[:, 0]
        return row, order.gather(1, best)[:, 0]

    def _brute(self, query: Tensor) -> tuple[Tensor, Tensor]:
        d = to_all(self.keys, query, self.metric)
        inside = d <= self.radii
        order = d if self.rule == "nearest-then-check" else torch.where(inside, d, torch.inf)
        best = order.argmin()
        return torch.where(inside[best], best, -1), order[best]
