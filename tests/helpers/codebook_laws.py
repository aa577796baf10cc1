"""Laws of a codebook as plain checks: their tests draw examples, the tests of faults pass one that must fail."""

from __future__ import annotations

import math

import pytest
import torch

from testbed.editors.codebook.nearest import direct
from tests.reference.codebook import Point, Row, add, book, hits, radii


def check_07_no_action_at_a_distance(rows: list[Row], new: Row) -> None:
    c = book(rows)
    before, entries, by = radii(c), list(c.entries), dict(zip([r.id for r in rows], c.capped_by.tolist()))
    gone = set(add(c, new))
    assert c.entries[: len(entries)] == entries
    for r in rows:
        meets = math.dist(r.key, new.key) < r.raw + new.raw and r.label != new.label
        freed = by[r.id] >= 0 and rows[by[r.id]].id in gone
        assert meets or r.id in gone or freed or radii(c)[r.id] == before[r.id]


def check_21_scale(rows: list[Row], xs: list[Point], power: int) -> None:
    s = 2.0**power
    big = [Row(r.id, tuple(s * x for x in r.key), s * r.raw, r.label, s * r.positive) for r in rows]
    a, b = book(rows), book(big)
    assert hits(a, xs) == hits(b, [tuple(s * v for v in x) for x in xs])
    assert {k: s * v if v > 0 else v for k, v in radii(a).items()} == pytest.approx(radii(b), rel=1e-12)
    keys = torch.tensor([r.key for r in rows])
    assert torch.equal(direct(keys, keys[:1], "cosine"), direct(s * keys, s * keys[:1], "cosine"))


def check_32_labels_are_token_sequences() -> None:
    c = book([Row("a", (0.0, 0, 0), 2.0, (12, 14))])
    assert add(c, Row("b", (0.0, 0, 0), 2.0, (13, 13))) == ["a"]
    assert c.members("a") == []
