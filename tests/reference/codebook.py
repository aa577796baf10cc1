"""The codebook in quadratic pure Python: no tensors, no caches, everything from scratch at every question."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

from testbed.editors.codebook.codebook import _SHARE, Codebook, Entry
from testbed.editors.codebook.nearest import Metric, Nearest, Rule, to_all

Point = tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One edit: id, key, raw radius, label, positive distance."""

    id: str
    key: Point
    raw: float
    label: tuple[int, ...]
    positive: float = 0.0


@dataclass
class ReferenceCodebook:
    """Alive rows in order of insertion."""

    rule: Rule = "nearest-then-check"
    nulls: list[Point] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def superseded(self, i: int) -> str | None:
        a = self.rows[i]
        for b in self.rows[i + 1 :]:
            if a.label != b.label and math.dist(a.key, b.key) <= max(a.positive, b.positive):
                return b.id
        return None

    def active(self) -> list[Row]:
        return [r for i, r in enumerate(self.rows) if self.superseded(i) is None]

    def radius(self, a: Row) -> float:
        d = [(math.dist(a.key, b.key), a.raw + b.raw) for b in self.active() if b.label != a.label]
        return min([a.raw, *(x / both * _SHARE * a.raw for x, both in d if both > x)])

    def retrieve(self, x: Point) -> str | None:
        balls = [(math.dist(r.key, x), r, self.radius(r)) for r in self.active()]
        if self.rule == "containing-nearest":
            balls = [b for b in balls if b[0] <= b[2]]
        if not balls:
            return None
        d, row, radius = min(balls, key=lambda b: b[0])  # the first of equals: the oldest
        return row.id if d <= radius and d < self.null(x) else None

    def null(self, x: Point) -> float:
        speaks = [n for n in self.nulls if all(math.dist(n, r.key) > r.positive for r in self.active())]
        return min((math.dist(n, x) for n in speaks), default=math.inf)


def book(
    rows: list[Row], cls: type[Codebook] = Codebook, metric: Metric = "euclidean", rule: Rule = "nearest-then-check", **kw: Any
) -> Any:
    out = cls(DIM, metric, rule, **kw)
    for r in rows:
        add(out, r)
    return out


def add(c: Codebook, r: Row) -> list[str]:
    return c.insert(torch.tensor(r.key, dtype=torch.float), r.raw, Entry(r.id, r.label, True, r.positive))


def hit(c: Codebook, x: Point) -> str | None:
    """The edit whose row fires, by its own id whatever entry it belongs to."""
    return hits(c, [x])[0]


def hits(c: Codebook, xs: list[Point]) -> list[str | None]:
    row = c.retrieve(torch.tensor(xs, dtype=torch.float))[0].tolist()
    return [c.entries[i].event_id if i >= 0 else None for i in row]


def radii(c: Codebook) -> dict[str, float]:
    return {e.event_id: r for e, r, alive in zip(c.entries, c.radii.tolist(), c.alive.tolist()) if alive}


def nearest_by_brute_force(search: Nearest, query: torch.Tensor) -> tuple[int, float]:
    """The row that answers, or -1, and the decisive distance, from the distances of a query (f,) to all keys, one key at a time."""
    d, radii = to_all(search.keys.all, query, search.keys.metric).tolist(), search.radii.tolist()
    counts = [r >= 0 and (search.rule == "nearest-then-check" or x <= r) for x, r in zip(d, radii)]
    rows = [i for i, counted in enumerate(counts) if counted]
    if not rows:
        return -1, math.inf
    row = min(rows, key=lambda i: (d[i], -i if search.newest else i))
    return row if d[row] <= radii[row] else -1, d[row]


EXAMPLES = int(os.environ.get("TESTBED_EXAMPLES", "50"))
"""Examples of each law; the ordinary run has some thousands over all laws, `.ci/run` twice as many, and TESTBED_EXAMPLES=2000 has them
for each."""
DIM = 3
SCALES = [0.25, 1.0, 8.0]
grid = st.tuples(*[st.integers(-6, 6)] * DIM)
labels = st.sampled_from([(1,), (2,), (1, 3), (2, 2)])


@st.composite
def worlds(draw: Any, largest: int = 8, positive: int = 2, unique: bool = False, smallest: int = 0) -> list[Row]:
    """Rows on a small grid (distances are exact), scaled by a power of two."""
    s = draw(st.sampled_from(SCALES))
    keys = draw(st.lists(grid, min_size=smallest, max_size=largest, unique=unique))
    what = [(draw(st.integers(0, 6)), draw(labels), draw(st.integers(0, positive))) for _ in keys]
    return [Row(f"e{i}", tuple(s * x for x in k), s * r, label, s * p) for i, (k, (r, label, p)) in enumerate(zip(keys, what))]


queries = st.lists(st.tuples(*[st.integers(-12, 12).map(lambda x: x / 2)] * DIM), min_size=1, max_size=6)
