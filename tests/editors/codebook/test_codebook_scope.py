"""Radii, geometry, arithmetic, files and time of a codebook. Numbers name the promise."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.editors.codebook import nearest
from testbed.editors.codebook.balancedit import radius
from testbed.editors.codebook.codebook import Codebook, Entry
from testbed.editors.codebook.nearest import Keys, Nearest, direct, to_all
from testbed.storage.files import read_state, write_state
from tests.helpers.codebook_laws import check_21_scale
from tests.reference.codebook import EXAMPLES, Row, add, book, grid, hit, hits, nearest_by_brute_force, queries, radii, worlds

quick = settings(max_examples=EXAMPLES, deadline=None)
cheap = settings(max_examples=5 * EXAMPLES, deadline=None)
share = st.floats(0, 1)
far = st.floats(0, 1e6)
rules = st.sampled_from(["nearest-then-check", "containing-nearest"])


@cheap
@given(w=share, d_pos=far, d_neg=far)
def test_13_the_radius_lies_between_separable_anchors(w: float, d_pos: float, d_neg: float) -> None:
    if d_pos < d_neg:
        assert d_pos * (1 - 1e-12) <= radius(w, d_pos, d_neg) <= d_neg * (1 + 1e-12)


def test_13_strictly_between_for_an_inner_weight() -> None:
    assert 1.0 < radius(0.2, 1.0, 5.0) < 5.0


@cheap
@given(d_pos=far, d_neg=far, a=share, b=share)
def test_14_the_radius_falls_as_the_positive_anchor_weighs_more(d_pos: float, d_neg: float, a: float, b: float) -> None:
    if d_pos < d_neg:
        low, high = sorted((a, b))
        assert radius(high, d_pos, d_neg) <= radius(low, d_pos, d_neg) * (1 + 1e-12)
        assert radius(0.0, d_pos, d_neg) == d_neg
        assert radius(1.0, d_pos, d_neg) == d_pos


@cheap
@given(w=share, d_pos=far, d_neg=st.floats(1e-300, 1e6))
def test_15_anchors_that_are_not_separable_give_less_than_the_negative(w: float, d_pos: float, d_neg: float) -> None:
    eps = radius(w, max(d_pos, d_neg), d_neg)
    assert 0 <= eps < d_neg


@cheap
@given(w=st.floats(0.01, 0.99), d_pos=st.floats(0, 1e3), gap=st.floats(0.01, 1e3))
def test_16_alone_the_positive_anchor_is_in_and_the_negative_out(w: float, d_pos: float, gap: float) -> None:
    d_neg = d_pos + gap
    search = Nearest(Keys(torch.zeros(1, 1)), torch.tensor([radius(w, d_pos, d_neg)], dtype=torch.float64))
    assert search(torch.tensor([[d_pos], [d_neg]], dtype=torch.float32))[0].tolist() == [0, -1]


@quick
@given(rows=worlds(positive=0, smallest=1), x=grid)
def test_16_in_a_full_codebook_the_positive_anchor_still_hits_something(rows: list[Row], x: tuple) -> None:
    """Under containing-nearest, where no rival caps the entry: a later ball may take the anchor over, none takes it away."""
    c = book(rows, rule="containing-nearest")
    reach = radii(c)
    for r in rows:
        if reach[r.id] == r.raw and math.dist(r.key, x) <= r.raw:
            assert hit(c, x) is not None


@cheap
@given(w=share, pos=st.lists(far, min_size=1, max_size=4), neg=st.lists(far, min_size=1, max_size=4), more=far)
def test_17_a_further_negative_never_widens_and_a_further_positive_narrows_only_against_a_negative(
    w: float, pos: list[float], neg: list[float], more: float
) -> None:
    eps = radius(w, max(pos), min(neg))
    assert radius(w, max(pos), min([*neg, more])) <= eps * (1 + 1e-12)
    wider = radius(w, max([*pos, more]), min(neg))
    assert wider >= eps * (1 - 1e-12) or max([*pos, more]) >= min(neg)


def test_19_a_paraphrase_at_distance_zero() -> None:
    eps = radius(0.2, 0.0, 5.0)
    assert eps == 4.0
    assert radius(1.0, 0.0, 5.0) == 0.0
    assert hit(book([Row("a", (1.0, 2, 3), 0.0, (1,))]), (1, 2, 3)) == "a"


@quick
@given(rows=worlds(unique=True, smallest=1), xs=queries, seed=st.integers(0, 99), rule=rules)
def test_20_a_rotation_changes_nothing(rows: list[Row], xs: list, seed: int, rule: Any) -> None:
    g = np.random.default_rng(seed)
    turn, move = np.linalg.qr(g.normal(size=(3, 3)))[0], g.normal(size=3)
    a = book(rows, rule=rule)
    b = book([Row(r.id, tuple(turn @ r.key + move), r.raw, r.label, r.positive) for r in rows], rule=rule)
    if any(abs(math.dist(p.key, q.key) - z) < 1e-3 for p in rows for q in rows for z in (p.raw + q.raw, p.positive, q.positive)):
        return
    for x in xs:
        d = sorted(math.dist(x, r.key) for r in rows)
        edge = any(abs(math.dist(x, r.key) - radii(a)[r.id]) < 1e-3 for r in rows) or any(q - p < 1e-3 for p, q in pairwise(d))
        assert edge or hit(a, x) == hit(b, tuple(turn @ x + move))


@quick
@given(rows=worlds(smallest=1), xs=queries, power=st.integers(-3, 5))
def test_21_scale(rows: list[Row], xs: list, power: int) -> None:
    check_21_scale(rows, xs, power)


@quick
@given(rows=worlds(), xs=queries, order=st.permutations([0, 1, 2]))
def test_22_the_order_of_coordinates_does_not_matter(rows: list[Row], xs: list, order: list[int]) -> None:
    def moved(x: Any) -> tuple:
        return tuple(x[i] for i in order)

    other = book([Row(r.id, moved(r.key), r.raw, r.label, r.positive) for r in rows])
    assert hits(book(rows), xs) == hits(other, [moved(x) for x in xs])


def test_23_a_zero_vector_under_cosine_is_at_distance_one() -> None:
    assert direct(torch.zeros(1, 3), torch.ones(1, 3), "cosine").tolist() == [1.0]
    assert direct(torch.ones(1, 3), torch.ones(1, 3), "cosine").tolist() == [0.0]
    c = book([Row("a", (1.0, 0, 0), 0.5, (1,))], metric="cosine")
    assert hit(c, (0, 0, 0)) is None
    with pytest.raises(ValueError, match="no direction"):
        add(c, Row("b", (0.0, 0, 0), 0.5, (1,)))


@quick
@given(rows=worlds(), xs=queries, rule=rules, rng=st.randoms(use_true_random=False))
def test_24_batched_is_one_by_one_in_any_order(rows: list[Row], xs: list, rule: Any, rng: Any) -> None:
    c = book(rows, rule=rule)
    order = list(range(len(xs)))
    rng.shuffle(order)
    assert hits(c, [xs[i] for i in order]) == [hit(c, xs[i]) for i in order]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("rule", ["nearest-then-check", "containing-nearest"])
def test_27_the_search_is_the_brute_force_one(metric: Any, rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    keys = 1 + torch.randn(300, 24, generator=g)
    keys[50:70] = keys[0]
    keys[70:90] = keys[1] + 1e-6 * torch.randn(20, 24, generator=g)
    queries = torch.cat([1 + torch.randn(60, 24, generator=g), keys[:90], keys[:30] + 1e-6, 10 * torch.randn(40, 24, generator=g)])
    reach = torch.rand(300, generator=g, dtype=torch.float64) * (7 if metric == "euclidean" else 0.4)
    search = Nearest(Keys(keys, metric), reach, rule)
    row, distance = search(queries)
    want = [nearest_by_brute_force(search, q) for q in queries]
    assert 0.2 < float((row >= 0).float().mean()) < 1
    assert row.tolist() == [i for i, _ in want]
    assert distance.tolist() == pytest.approx([d for _, d in want], rel=1e-12)
    monkeypatch.setattr(nearest, "_CHUNK", 24 * 13)
    again, same = search(queries)
    assert torch.equal(again, row) and torch.equal(same, distance)


@quick
@given(rows=worlds(smallest=1), key=grid, extra=st.integers(0, 12), metric=st.sampled_from(["euclidean", "cosine"]))
def test_27_distances_within_reach_are_the_exact_ones(rows: list[Row], key: tuple, extra: int, metric: Any) -> None:
    keys = Keys(torch.tensor([r.key for r in rows]), metric)
    x, bound = torch.tensor(key).float(), torch.tensor([r.raw + extra for r in rows]).double()
    got, want = keys.exact(x, keys.bounds(x)[0] <= bound), to_all(keys.all, x, metric)
    assert torch.equal(got[want <= bound], want[want <= bound])
    assert bool((got[want > bound] > bound[want > bound]).all())


def test_27_keys_that_grow_change_no_view_that_was_handed_out() -> None:
    g = torch.Generator().manual_seed(0)
    keys, views = Keys(torch.zeros(0, 4)), []
    for n in (1, 3, 40, 2, 200):
        keys.add(torch.randn(n, 4, generator=g))
        views.append((keys.all, keys.norms, keys.all.clone(), keys.norms.clone()))
    for view, norms, kept, kept_norms in views:
        assert torch.equal(view, kept) and torch.equal(norms, kept_norms)
    assert keys.nbytes >= keys.all.nbytes * 2


def test_27_rows_with_a_negative_radius_take_no_part_and_the_newest_may_win() -> None:
    keys = Keys(torch.zeros(6, 2))
    out = torch.tensor([1.0, 1, 1, -1, 1, -1]).double()
    for newest, row in ((False, 0), (True, 4)):
        search = Nearest(keys, out, newest=newest)
        assert search(torch.zeros(1, 2))[0].tolist() == [row]
        assert nearest_by_brute_force(search, torch.zeros(2))[0] == row
    for rule in ("nearest-then-check", "containing-nearest"):
        none = Nearest(keys, torch.full((6,), -1.0).double(), rule)(torch.zeros(1, 2))
        assert [t.tolist() for t in none] == [[-1], [math.inf]]


def test_27_numbers_that_overflow_fall_back_on_exact_differences() -> None:
    c = Codebook(3)
    for i, x in enumerate((1e25, -1e25, 3e25)):
        add(c, Row(f"e{i}", (x, 0.0, 0.0), 1e24, (i,)))
    assert hits(c, [(1e25, 0, 0), (-1.05e25, 0, 0), (0, 0, 0)]) == ["e0", "e1", None]


def test_28_bf16_keys_hit_themselves() -> None:
    c = Codebook(64)
    keys = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for i, k in enumerate(keys):
        c.insert(k, 0.0, Entry(f"e{i}", (i,)))
    assert c.keys.dtype == torch.float32
    assert c.retrieve(keys)[0].tolist() == list(range(20))


def test_29_no_generator_is_read(tmp_path: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    c = book([Row(f"e{i}", (float(i), 0, 0), 1.0, (i,)) for i in range(5)])
    hits(c, [(0, 0, 0)])
    write_state(tmp_path / "step-000001.safetensors", c.state())
    Codebook(3).load(read_state(tmp_path / "step-000001.safetensors"))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


@quick
@given(rows=worlds(), more=worlds(largest=2), xs=queries, rule=rules)
def test_34_save_and_load(rows: list[Row], more: list[Row], xs: list, rule: Any) -> None:
    a, b = book(rows, rule=rule, nulls=torch.ones(2, 3)), Codebook(3, rule=rule)
    state = a.state()
    words = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
    b.load({**state, **json.loads(json.dumps(words))})
    for c in (a, b):
        for r in more:
            add(c, Row(f"more-{r.id}", r.key, r.raw, r.label, r.positive))
        if rows:
            c.remove([rows[0].id])
    assert radii(a) == radii(b)
    assert a.log == b.log
    assert hits(a, xs) == hits(b, xs)


@pytest.mark.ci
@quick
@given(rows=worlds(smallest=1), gone=st.sets(st.integers(0, 7)), xs=queries)
def test_35_time_travel(rows: list[Row], gone: set[int], xs: list) -> None:
    c, seen = Codebook(3), [[None] * len(xs)]
    for i, r in enumerate(rows):
        add(c, r)
        seen.append(hits(c, xs))
        if i in gone:
            c.remove([rows[i // 2].id] if c.alive[i // 2] else [r.id])
            seen.append(hits(c, xs))
    assert seen == [hits(c.as_of(t), xs) for t in range(len(c.log) + 1)]
    with pytest.raises(ValueError, match="no state after"):
        c.as_of(len(c.log) + 1)


def test_36_replay_writes_the_same_bytes(tmp_path: Path) -> None:
    rows = [Row(f"e{i}", (float(i % 4), float(i % 3), 0.0), 1.0 + i % 5, ((1,), (2,))[i % 2], 0.5) for i in range(12)]
    c = book(rows)
    c.remove(["e3", "e7"])
    files = [tmp_path / f"step-{n:06d}.safetensors" for n in (1, 2)]
    for path, what in zip(files, (c, c.as_of(len(c.log)))):
        write_state(path, what.state())
    assert files[0].read_bytes() == files[1].read_bytes()


@given(x=grid)
@quick
def test_bad_rows_are_refused_and_bad_queries_miss(x: tuple) -> None:
    c = book([Row("a", (0.0, 0, 0), 100.0, (1,))])
    for key, eps in [((math.nan, 0, 0), 1.0), ((0.0, 0, math.inf), 1.0), (x, -1.0), (x, math.nan), (x, math.inf)]:
        with pytest.raises(ValueError, match="finite"):
            add(c, Row("b", key, eps, (1,)))
    with pytest.raises(ValueError, match="already"):
        add(c, Row("a", x, 1.0, (1,)))
    assert hits(c, [(math.nan, 0, 0), x, (math.inf, 0, 0)]) == [None, "a", None]
    assert len(c) == 1


@quick
@given(seed=st.integers(0, 2**16), metric=st.sampled_from(["euclidean", "cosine"]), rule=rules, newest=st.booleans())
def test_27_many_keys_at_one_place_are_searched_as_by_brute_force(seed: int, metric: Any, rule: Any, newest: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(6, 3, generator=g).repeat(7, 1)[torch.randperm(42, generator=g)]
    queries = torch.cat([keys[:8], keys[:8] + 1e-4 * torch.randn(8, 3, generator=g), torch.randn(8, 3, generator=g)])
    radii = torch.rand(42, generator=g).double() - 0.2
    search = Nearest(Keys(keys, metric), radii, rule, newest)
    row, distance = search(queries)
    assert list(zip(row.tolist(), distance.tolist())) == [nearest_by_brute_force(search, q) for q in queries]
