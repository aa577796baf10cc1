"""Distances and nearest keys: one fp32 matrix product bounds all distances, and exact float64 differences decide.

Every key that could be the nearest by these bounds is measured exactly. So the answer is the one of a brute-force
search, whatever the batch, the chunk or the device, and a key's distance to itself is exactly zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from testbed.editors.base import appended

Metric = Literal["euclidean", "cosine"]
Rule = Literal["nearest-then-check", "containing-nearest"]
_ROUNDING = 2.0**-23
_CHUNK = 2**18
"""Numbers of one exact comparison held at once: few enough to stay in a processor's cache."""


def direct(a: Float[Tensor, "*a f"], b: Float[Tensor, "*b f"], metric: Metric) -> Float64[Tensor, ...]:
    """(...,) float64 distances by direct differences along the last axis. The cosine distance of a zero vector counts as 1."""
    a, b = a.double(), b.double()
    if metric == "euclidean":
        return torch.sub(a, b).square_().sum(-1).sqrt_()
    # half the squared chord: exactly zero for equal vectors, 1 - cosine otherwise
    chord = (unit(a) - unit(b)).square().sum(-1) / 2
    zero = (a.abs().amax(-1) == 0) | (b.abs().amax(-1) == 0)
    return torch.where(zero, torch.ones_like(chord), chord)


def to_all(keys: Float[Tensor, "n f"], key: Float[Tensor, " f"], metric: Metric) -> Float64[Tensor, " n"]:
    """(n,) float64 distances of one key (f,) to keys (n, f), a chunk at a time."""
    return torch.cat([direct(part, key, metric) for part in keys.split(max(1, _CHUNK // max(1, keys.shape[1])))])


def unit(x: Float[Tensor, "*n f"]) -> Float[Tensor, "*n f"]:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


class Keys:
    """Keys (n, f) float32 that only grow, with what a search needs of them, here and on other devices.

    They lie in buffers with rows to spare, which are written only past every view that was handed out: a view never changes.
    A search goes over the points of m rows in rising order: of all rows, until `search_among` leaves some out. It does, because
    nine in ten edits of the committed streams change a fact again, and their keys would be searched for nothing.
    """

    def __init__(self, keys: Tensor, metric: Metric = "euclidean") -> None:
        self.metric: Metric = metric
        self._all = self._points = keys[:0].float()
        self._norms = self._all.sum(1)
        self._rows = torch.zeros(0, dtype=torch.long, device=keys.device)
        self._centre = self._all.sum(0)
        self._size = self._searched = 0
        self._copies: dict[torch.device, Keys] = {}
        self._longest = 0.0
        self.add(keys)

    def __len__(self) -> int:
        return self._size

    @property
    def all(self) -> Float32[Tensor, "n f"]:
        return self._all[: self._size]

    @property
    def nbytes(self) -> int:
        """Bytes held on this device, spare rows included."""
        return self._all.nbytes + self._points.nbytes + self._norms.nbytes + self._rows.nbytes

    @property
    def rows(self) -> Int[Tensor, " m"]:
        """(m,) the rows that are searched."""
        return self._rows[: self._searched]

    @property
    def norms(self) -> Float32[Tensor, " m"]:
        """(m,) squared norms of their points."""
        return self._norms[: self._searched]

    def add(self, keys: Float[Tensor, "m f"]) -> None:
        """Append keys (m, f)."""
        if not len(keys):
            return
        keys = keys.to(self._all)
        if not self._size and self.metric == "euclidean":
            self._centre = keys[0].clone()  # any point among the keys spares digits
        self._all = appended(self._all, self._size, keys)
        self._size += len(keys)
        self._search_also(torch.arange(self._size - len(keys), self._size, device=keys.device))

    def _search_also(self, rows: Tensor) -> None:
        points, at = self.point(self._all[rows]), self._searched
        norms = points.square().sum(1)
        self._points, self._norms, self._rows = (
            appended(buffer, at, new) for buffer, new in zip((self._points, self._norms, self._rows), (points, norms, rows))
        )
        self._searched += len(rows)
        self._longest = max(self._longest, float(norms.max().sqrt()))

    def search_among(self, wanted: Bool[Tensor, " n"]) -> None:
        """Search the wanted rows, (n,) bool. Others are left out only once they are the greater part, because that copies the points."""
        missing = int(wanted.sum()) - int(wanted[self.rows].sum())
        if missing or self._searched > 2 * int(wanted.sum()):
            self._search_only(wanted.nonzero()[:, 0])

    def _search_only(self, rows: Tensor) -> None:
        self._points, self._norms, self._rows, self._searched = self._points[:0], self._norms[:0], self._rows[:0], 0
        self._longest, self._copies = 0.0, {}
        if len(rows):
            self._search_also(rows)

    def on(self, device: torch.device) -> Keys:
        """The same keys on a device. The copy there is kept and grows with these keys."""
        if device == self._all.device:
            return self
        copy = self._copies.get(device)
        if copy is None:
            copy = Keys(self.all.to(device), self.metric)
            if self._searched < self._size:
                copy._search_only(self.rows.to(device))
        copy.add(self.all[len(copy) :])
        self._copies[device] = copy
        return copy

    def point(self, x: Float[Tensor, "n f"]) -> Float32[Tensor, "n f"]:
        """Vectors whose squared Euclidean distances order the keys (for cosine: twice the distance)."""
        return x - self._centre if self.metric == "euclidean" else unit(x.double()).float()

    def square(self, distance: Tensor) -> Tensor:
        """The squared distance of two points whose keys have this distance."""
        return distance.square() if self.metric == "euclidean" else 2 * distance

    def distance(self, square: Tensor) -> Tensor:
        """The distance of two keys whose points have this squared distance."""
        return square.sqrt() if self.metric == "euclidean" else square / 2

    def squares(
        self, q: Float[Tensor, "B f"], norms: Float[Tensor, " m"]
    ) -> tuple[Float32[Tensor, "B m"], Float32[Tensor, "B 1"], Float32[Tensor, "B 1"]]:
        """For queries (B, f): squared distances of points (B, m) float32 less each query's own part (B, 1); their error (B, 1)."""
        x = self.point(q)
        own = x.square().sum(1, keepdim=True)
        part = torch.addmm(norms, x, self._points[: self._searched].T, alpha=-2)
        return part, own, (q.shape[1] + 16) * _ROUNDING * (own.sqrt() + self._longest).square()

    def bounds(self, key: Float[Tensor, " f"]) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
        """(n,) float64 numbers between which the distance of each key to this one (f,) certainly lies; 0 and inf for rows not searched."""
        part, own, error = self.squares(key[None], self.norms)
        least, most = ((part + own + e)[0].double().clamp_min(0.0) for e in (-error, error))
        known = most.isfinite()  # not what overflowed
        low, high = (self.distance(x * (1 + r)) for x, r in ((least, -4 * _ROUNDING), (most, 4 * _ROUNDING)))
        none = torch.zeros(len(self), dtype=torch.float64, device=key.device)
        low = none.index_put((self.rows,), torch.where(known, low, 0.0))
        return low, (none + torch.inf).index_put((self.rows,), torch.where(known, high, torch.inf))

    def exact(self, key: Float[Tensor, " f"], wanted: Bool[Tensor, " n"]) -> Float64[Tensor, " n"]:
        """(n,) float64 distances of a key (f,) to those that are wanted, (n,) bool; inf to the others."""
        out = torch.full(wanted.shape, torch.inf, dtype=torch.float64, device=wanted.device)
        rows = wanted.nonzero()[:, 0]
        out[rows] = to_all(self.all[rows], key, self.metric)
        return out


class Nearest:
    """A search among keys with radii (n,) float64 on one device. A key whose radius is negative takes no part.

    Nearest-then-check: the nearest key answers if the query lies within its radius. Containing-nearest: the nearest of the keys
    within whose radius the query lies. Of equally near keys the first answers, with `newest` the last.
    """

    def __init__(self, keys: Keys, radii: Float64[Tensor, " n"], rule: Rule = "nearest-then-check", newest: bool = False) -> None:
        self.keys, self.radii, self.newest = keys, radii, newest
        self.rule: Rule = rule
        square = keys.square(radii[keys.rows]).float()
        self._outer, self._inner = square * (1 + 4 * _ROUNDING), square * (1 - 4 * _ROUNDING)
        self._norms = torch.where(radii[keys.rows] >= 0, keys.norms, torch.inf)

    def __call__(self, queries: Float[Tensor, "B f"]) -> tuple[Int[Tensor, " B"], Float64[Tensor, " B"]]:
        """Queries (B, f) float32 to (B,) the row of the key that answers, or -1, and (B,) the float64 distance that was decisive.

        That is the distance of the nearest key under the rule, inf for none. A query that is not finite finds nothing.
        """
        finite = queries.isfinite().all(1)
        queries = torch.where(finite[:, None], queries, 0.0)
        nothing = torch.full_like(finite, -1, dtype=torch.long), torch.full_like(finite, torch.inf, dtype=torch.float64)
        if not len(self._norms):
            return nothing
        query, searched = self._possible(queries).nonzero().unbind(1)
        row = self.keys.rows[searched]
        d = self._pair_distances(queries, query, row)
        counts = self.radii[row] >= 0 if self.rule == "nearest-then-check" else d <= self.radii[row]
        d = torch.where(counts, d, torch.inf)
        distance = nothing[1].scatter_reduce(0, query, d, "amin")
        nearest = d == distance[query]
        best = nothing[0].scatter_reduce(0, query[nearest], row[nearest], "amax" if self.newest else "amin", include_self=False)
        hit = finite & (distance <= self.radii[best])
        return torch.where(hit, best, -1), torch.where(finite, distance, torch.inf)

    def _possible(self, queries: Tensor) -> Tensor:
        """(B, m) bool: the searched keys that may answer. A number that overflowed rules nothing out."""
        part, own, error = self.keys.squares(queries, self._norms)
        if self.rule == "nearest-then-check":
            return ~(part > part.amin(1, keepdim=True) + 2 * error)
        surely_inside = part.masked_fill(part + own + error > self._inner, torch.inf)
        return ~((part + own - error > self._outer) | (part > surely_inside.amin(1, keepdim=True) + 2 * error))

    def _pair_distances(self, queries: Tensor, query: Tensor, row: Tensor) -> Tensor:
        """(p,) float64 distances of p pairs of a query and a row, a chunk at a time."""
        chunk = max(1, _CHUNK // queries.shape[1])
        pairs = zip(query.split(chunk), row.split(chunk))
        return torch.cat([direct(self.keys.all[r], queries[q], self.keys.metric) for q, r in pairs])
