"""The codebook's promises, on pure codebooks: keys on small integer grids, so distances are exact."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.editors._nearest import direct
from testbed.editors.balancedit import radius
from testbed.editors.codebook import Codebook, Entry

WIDTH = 3
grid = st.tuples(*[st.integers(-8, 8)] * WIDTH)
entries = st.lists(st.tuples(grid, st.integers(0, 6), st.integers(1, 3)), min_size=1, max_size=9, unique_by=lambda e: e[0])


def book(rows: list[tuple[tuple[int, ...], float, int]], positive: float = 0.0) -> Codebook:
    out = Codebook(WIDTH)
    for i, (key, r, label) in enumerate(rows):
        out.insert(torch.tensor(key, dtype=torch.float), float(r), Entry(f"e{i}", (label,), True, positive))
    return out


def reference(c: Codebook, x: tuple[int, ...]) -> str | None:
    """Nearest-then-check in pure Python float64; of equal distances the lowest entry."""
    alive = [(math.dist(k.tolist(), x), i) for i, k in enumerate(c.keys) if c.active[i]]
    if not alive:
        return None
    d, i = min(alive)
    return c.entries[i].event_id if d <= float(c.radii[i]) * (1 + 1e-9) else None


def hit(c: Codebook, x: tuple[int, ...]) -> str | None:
    i = int(c.retrieve(torch.tensor([x], dtype=torch.float))[0][0])
    return c.entries[i].event_id if i >= 0 else None


@settings(max_examples=300, deadline=None)
@given(entries, st.lists(grid, min_size=1, max_size=6))
def test_retrieval_is_the_plain_quadratic_one(rows: list, xs: list) -> None:
    c = book(rows)
    for x in xs:
        want = reference(c, x)
        d = min(math.dist(k.tolist(), x) for k in c.keys)
        edge = any(abs(d - float(r)) < 1e-4 for r in c.radii)
        assert hit(c, x) == want or edge


@settings(max_examples=300, deadline=None)
@given(entries)
def test_self_hit_right_after_insertion(rows: list) -> None:
    c = Codebook(WIDTH)
    for i, (key, r, label) in enumerate(rows):
        c.insert(torch.tensor(key, dtype=torch.float), float(r), Entry(f"e{i}", (label,), True, 0.0))
        assert hit(c, key) == f"e{i}"


@settings(max_examples=300, deadline=None)
@given(entries)
def test_balls_of_different_answers_are_disjoint(rows: list) -> None:
    c = book(rows)
    for i in range(len(c)):
        for j in range(i):
            if c.entries[i].label != c.entries[j].label:
                assert float(c.radii[i] + c.radii[j]) <= math.dist(c.keys[i].tolist(), c.keys[j].tolist()) * (1 + 1e-6)


@settings(max_examples=300, deadline=None)
@given(entries, st.randoms(use_true_random=False))
def test_radii_do_not_depend_on_the_order_of_insertion(rows: list, rng: object) -> None:
    shuffled = list(enumerate(rows))
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    a, b = book(rows), book([r for _, r in shuffled])
    back = [next(j for j, (i, _) in enumerate(shuffled) if i == k) for k in range(len(rows))]
    assert torch.allclose(a.radii, b.radii[back], rtol=1e-5)


@settings(max_examples=300, deadline=None)
@given(entries, st.tuples(grid, st.integers(0, 6), st.integers(1, 3)), st.integers(0, 4))
def test_delete_restores_every_field(rows: list, new: tuple, positive: int) -> None:
    c = book(rows, positive=0.0)
    before = (c.alive, c.superseded, c.caps, c.capped_by, c.radii)
    c.insert(torch.tensor(new[0], dtype=torch.float), float(new[1]), Entry("new", (new[2],), True, float(positive)))
    c.remove({"new"})
    after = (c.alive, c.superseded, c.caps, c.capped_by, c.radii)
    assert all(torch.equal(x, y[:-1]) for x, y in zip(before, after))
    assert not c.alive[-1]


@settings(max_examples=200, deadline=None)
@given(entries, st.tuples(grid, st.integers(0, 6), st.integers(1, 3)))
def test_no_action_at_a_distance(rows: list, new: tuple) -> None:
    c = book(rows)
    before = c.radii.clone()
    c.insert(torch.tensor(new[0], dtype=torch.float), float(new[1]), Entry("new", (new[2],), True, 0.0))
    for i, e in enumerate(c.entries[:-1]):
        far = math.dist(c.keys[i].tolist(), new[0]) >= float(c.raw[i]) + new[1]
        if c.active[i] and (far or e.label == (new[2],)):
            assert float(c.radii[i]) == float(before[i])


def test_same_key_other_answer_leaves_one_active_and_comes_back() -> None:
    c = book([((0, 0, 0), 2, 1)])
    assert c.insert(torch.zeros(WIDTH), 2.0, Entry("newer", (2,), True, 0.0)) == ["e0"]
    assert hit(c, (0, 0, 0)) == "newer"
    c.remove({"newer"})
    assert hit(c, (0, 0, 0)) == "e0"
    assert float(c.radii[0]) == 2.0


def test_the_boundary_hits_and_the_next_number_misses() -> None:
    c = book([((0, 0, 0), 3, 1)])
    assert hit(c, (3, 0, 0)) == "e0"
    beyond = torch.tensor([[math.nextafter(3.0, 4.0) + 1e-6, 0.0, 0.0]])
    assert int(c.retrieve(beyond)[0][0]) == -1


def test_ties_go_to_the_older_entry() -> None:
    c = book([((1, 0, 0), 2, 1), ((-1, 0, 0), 2, 1)])
    assert hit(c, (0, 0, 0)) == "e0"


def test_an_unknown_entry_cannot_be_removed_and_nothing_changes() -> None:
    c = book([((0, 0, 0), 2, 1)])
    with pytest.raises(KeyError, match="nobody"):
        c.remove({"nobody"})
    assert len(c) == 1


def test_a_zero_vector_under_cosine_is_at_distance_one() -> None:
    d = direct(torch.zeros(1, WIDTH), torch.ones(1, WIDTH), "cosine")
    assert float(d[0]) == 1.0
    assert float(direct(torch.ones(1, WIDTH), torch.ones(1, WIDTH), "cosine")[0]) == 0.0


@given(st.floats(0, 1), st.floats(0.0, 100), st.floats(0.001, 100))
def test_the_radius_lies_between_its_anchors(w: float, d_pos: float, d_neg: float) -> None:
    eps = radius(w, d_pos, d_neg)
    assert eps >= 0
    if d_pos < d_neg:
        assert d_pos * (1 - 1e-9) <= eps <= d_neg * (1 + 1e-9)
    else:
        assert eps < d_neg


def test_the_radius_shrinks_as_the_positive_anchor_weighs_more() -> None:
    eps = [radius(w / 10, 1.0, 5.0) for w in range(11)]
    assert eps[0] == 5.0
    assert eps[-1] == 1.0
    assert all(a > b for a, b in pairwise(eps))


@settings(max_examples=100, deadline=None)
@given(entries, st.lists(grid, min_size=2, max_size=6))
def test_batched_is_one_by_one_and_the_state_round_trips(rows: list, xs: list) -> None:
    c = book(rows)
    q = torch.tensor(xs, dtype=torch.float)
    together = c.retrieve(q)[0].tolist()
    assert together == [int(c.retrieve(x[None])[0][0]) for x in q]
    other = Codebook(WIDTH)
    other.load(c.state())
    assert other.retrieve(q)[0].tolist() == together
