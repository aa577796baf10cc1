"""Distances and nearest keys: one fp32 matrix product chooses candidates, exact differences judge them.

The product is never trusted beyond its rounding: where more keys than were measured exactly could still be
the nearest, the row is measured against all that could be. So the answer is the brute-force one, whatever the
batch, the chunk or the device, and a key's distance to itself is exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from testbed.editors.codebook.growing import appended

Metric = Literal["euclidean", "cosine"]
Rule = Literal["nearest-then-check", "containing-nearest"]
_CANDIDATES = 4
_ROUNDING = 2.0**-23
_CHUNK = 2**18
"""Numbers of one exact comparison held at once: few enough to stay in a processor's cache."""


def direct(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """(...,) float64 distances by direct differences along the last axis. Cosine of a zero vector counts as distance 1."""
    a, b = a.double(), b.double()
    if metric == "euclidean":
        return torch.sub(a, b).square_().sum(-1).sqrt_()
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


class Keys:
    """Keys (n, f) float32 that only grow, with what a search needs of them, here and on other devices.

    They lie in buffers with room to spare, written only past every view that was handed out: a view never changes.
    A search goes over the points of m rows, rising: of all, until `search_among` leaves some out.
    """

    def __init__(self, keys: Tensor, metric: Metric = "euclidean") -> None:
        self.metric: Metric = metric
        self._all = self._points = keys[:0].float()
        self._norms = self._all.sum(1)
        self._rows = torch.zeros(0, dtype=torch.long, device=keys.device)
        self._centre = self._all.sum(0)
        self._size = self._kept = 0
        self._twins: dict[torch.device, Keys] = {}
        self.longest = 0.0
        self.add(keys)

    def __len__(self) -> int:
        return self._size

    @property
    def all(self) -> Tensor:
        return self._all[: self._size]

    @property
    def nbytes(self) -> int:
        """Bytes held here, spare room included."""
        return self._all.nbytes + self._points.nbytes + self._norms.nbytes + self._rows.nbytes

    @property
    def rows(self) -> Tensor:
        """(m,) the rows that are searched."""
        return self._rows[: self._kept]

    @property
    def norms(self) -> Tensor:
        """(m,) squared norms of their points."""
        return self._norms[: self._kept]

    def add(self, keys: Tensor) -> None:
        """Append keys (m, f)."""
        if not len(keys):
            return
        keys = keys.to(self._all)
        if not self._size and self.metric == "euclidean":
            self._centre = keys[0].clone()  # any point among the keys spares digits
        self._all = appended(self._all, self._size, keys)
        self._size += len(keys)
        self._keep(torch.arange(self._size - len(keys), self._size, device=keys.device))

    def _keep(self, rows: Tensor) -> None:
        """Search these rows besides."""
        points, at = self.point(self._all[rows]), self._kept
        norms = points.square().sum(1)
        self._points, self._norms, self._rows = (
            appended(room, at, new) for room, new in zip((self._points, self._norms, self._rows), (points, norms, rows))
        )
        self._kept += len(rows)
        self.longest = max(self.longest, float(norms.max().sqrt()))

    def search_among(self, wanted: Tensor) -> None:
        """Leave rows out of the search that are not wanted (n,) bool, once they are the greater part; bring wanted ones back."""
        missing = int(wanted.sum()) - int(wanted[self.rows].sum())
        if missing or self._kept > 2 * int(wanted.sum()):
            self._only(wanted.nonzero()[:, 0])

    def _only(self, rows: Tensor) -> None:
        self._points, self._norms, self._rows, self._kept = self._points[:0], self._norms[:0], self._rows[:0], 0
        self.longest, self._twins = 0.0, {}
        if len(rows):
            self._keep(rows)

    def on(self, device: torch.device) -> Keys:
        """The same keys on a device; a copy there is kept and grows along."""
        if device == self._all.device:
            return self
        twin = self._twins.get(device)
        if twin is None:
            twin = Keys(self.all.to(device), self.metric)
            if self._kept < self._size:
                twin._only(self.rows.to(device))
        twin.add(self.all[len(twin) :])
        self._twins[device] = twin
        return twin

    def point(self, x: Tensor) -> Tensor:
        """Vectors whose squared Euclidean distances order the keys (for cosine: twice the distance)."""
        return x - self._centre if self.metric == "euclidean" else unit(x.double()).float()

    def square(self, distance: Tensor) -> Tensor:
        """What the squared distance of two points is for a distance of their keys."""
        return distance.square() if self.metric == "euclidean" else 2 * distance

    def distance(self, square: Tensor) -> Tensor:
        """The reverse of `square`."""
        return square.sqrt() if self.metric == "euclidean" else square / 2

    def squares(self, q: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of queries (B, f): squared distances of points (B, m) float32, less a query's own part (B, 1); how far off they may be (B, 1)."""
        x = self.point(q)
        own = x.square().sum(1, keepdim=True)
        part = torch.addmm(norms, x, self._points[: self._kept].T, alpha=-2)
        return part, own, (q.shape[1] + 16) * _ROUNDING * (own.sqrt() + self.longest).square()

    def bounds(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) float64 numbers between which the distance of each key to this one (f,) certainly lies; 0 and inf for rows not searched."""
        part, own, slack = self.squares(key[None], self.norms)
        least, most = ((part + own + s)[0].double().clamp_min(0.0) for s in (-slack, slack))
        known = most.isfinite()  # not what overflowed
        low, high = (self.distance(x * (1 + r)) for x, r in ((least, -4 * _ROUNDING), (most, 4 * _ROUNDING)))
        none = torch.zeros(len(self), dtype=torch.float64, device=key.device)
        return none.index_put((self.rows,), torch.where(known, low, 0.0)), (none + torch.inf).index_put(
            (self.rows,), torch.where(known, high, torch.inf)
        )

    def exact(self, key: Tensor, wanted: Tensor) -> Tensor:
        """(n,) float64 distances of a key (f,) to those that are wanted (n,) bool; to the others inf."""
        out = torch.full(wanted.shape, torch.inf, dtype=torch.float64, device=wanted.device)
        rows = wanted.nonzero()[:, 0]
        out[rows] = to_all(self.all[rows], key, self.metric)
        return out

    def within(self, key: Tensor, reach: Tensor) -> Tensor:
        """(n,) float64 distances of a key (f,), exact where they are at most `reach` (n,); those beyond may be inf, those of a
        negative reach are."""
        return self.exact(key, (self.bounds(key)[0] <= reach) & (reach >= 0))


@dataclass(frozen=True)
class Found:
    """Per query: the row of the key that answers, or -1, and the float64 distance that was decisive.

    Nearest-then-check: the distance of the nearest key; containing-nearest: that of the answering key, inf for none.
    """

    row: Tensor
    distance: Tensor


class Nearest:
    """A search among keys with radii (n,) float64 on one device. A key whose radius is negative takes no part.

    Of equally near keys the first answers, with `newest` the last.
    """

    def __init__(self, keys: Keys, radii: Tensor, rule: Rule = "nearest-then-check", newest: bool = False) -> None:
        self.keys, self.radii, self.newest = keys, radii, newest
        self.rule: Rule = rule
        self._reach = keys.square(radii[keys.rows]).float() * (1 + 4 * _ROUNDING)
        self.norms = torch.where(radii[keys.rows] >= 0, keys.norms, torch.inf)

    def __call__(self, queries: Tensor) -> Found:
        """Search for queries (B, f) float32. A query that is not finite finds nothing."""
        finite = queries.isfinite().all(1)
        q = torch.where(finite[:, None], queries, 0.0)
        if not len(self.norms):
            return Found(torch.full_like(finite, -1, dtype=torch.long), torch.full_like(finite, torch.inf, dtype=torch.float64))
        part, own, slack = self._parts(q)
        least = part + own - slack
        near, sure = self._candidates(part, least)
        row, distance = self._judge(q, near)
        best = self.keys.square(distance)
        for i in (~(best < sure) & (sure != torch.inf)).nonzero()[:, 0].tolist():
            possible = ~(least[i] > best[i].float() * (1 + 4 * _ROUNDING))  # not what overflowed
            row[i], distance[i] = self._among(q[i], self.keys.rows[possible])
        return Found(torch.where(finite, row, -1), torch.where(finite, distance, torch.inf))

    def _parts(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`Keys.squares` of queries; inf for keys that take no part and, where only balls that hold a query count, certainly do not."""
        part, own, slack = self.keys.squares(q, self.norms)
        if self.rule == "containing-nearest":
            part = part.masked_fill(part + own - slack > self._reach, torch.inf)
        return part, own, slack

    def _candidates(self, part: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        """(B, k) candidate rows in the order of preference, and (B,) a squared distance that all other keys certainly exceed."""
        k = min(_CANDIDATES, len(self.norms))
        low = part.topk(k, largest=False).indices
        sure = least.gather(1, low[:, -1:])[:, 0].double() if k < len(self.norms) else torch.full_like(least[:, 0], torch.inf).double()
        return self.keys.rows[low].sort(1, descending=self.newest).values, sure

    def _judge(self, q: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """The answering row and the decisive distance among candidate rows (B, k)."""
        order, inside = self._order(direct(q.unsqueeze(1), self.keys.all[near], self.keys.metric), self.radii[near])
        best = order.argmin(1, keepdim=True)
        row = torch.where(inside.gather(1, best), near.gather(1, best), -1)[:, 0]
        return row, order.gather(1, best)[:, 0]

    def _among(self, query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The answering row and the decisive distance among rows (r,), rising, at least one."""
        order, inside = self._order(to_all(self.keys.all[rows], query, self.keys.metric), self.radii[rows])
        best = len(order) - 1 - order.flip(0).argmin() if self.newest else order.argmin()
        return torch.where(inside[best], rows[best], -1), order[best]

    def _order(self, d: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
        """By what the least is taken, and which keys hold the query."""
        inside = d <= radii
        counts = radii >= 0 if self.rule == "nearest-then-check" else inside
        return torch.where(counts, d, torch.inf), inside
