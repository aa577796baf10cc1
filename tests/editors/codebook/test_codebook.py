"""What a codebook promises about hits, misses and its neighbours, on pure codebooks. Numbers name the promise."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.editors.codebook.codebook import Codebook
from tests.helpers.codebook_laws import check_07_no_action_at_a_distance, check_32_labels_are_token_sequences
from tests.reference.codebook import EXAMPLES, ReferenceCodebook, Row, add, book, grid, hit, hits, labels, queries, radii, worlds

quick = settings(max_examples=EXAMPLES, deadline=None)
rules = st.sampled_from(["nearest-then-check", "containing-nearest"])


def new_row(positive: int = 0) -> st.SearchStrategy[Row]:
    return st.builds(lambda k, r, y, p: Row("new", k, float(r), y, float(p)), grid, st.integers(0, 6), labels, st.integers(0, positive))


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(rows=worlds(), xs=queries, rule=rules, nulls=st.lists(grid, max_size=4))
def test_retrieval_is_the_plain_quadratic_one(rows: list[Row], xs: list, rule: Any, nulls: list) -> None:
    c = book(rows, rule=rule, nulls=torch.tensor(nulls, dtype=torch.float).reshape(-1, 3))
    reference = ReferenceCodebook(rule, nulls, rows)
    assert hits(c, xs) == [reference.retrieve(x) for x in xs]
    want = {r.id: reference.radius(r) for r in reference.active()}
    assert {k: v for k, v in radii(c).items() if v >= 0} == pytest.approx(want, rel=1e-12)


@quick
@given(rows=worlds(), xs=queries, rule=rules)
def test_01_outside_every_ball_nothing_fires(rows: list[Row], xs: list, rule: Any) -> None:
    c = book(rows, rule=rule)
    for x in xs:
        outside = all(math.dist(x, r.key) > radii(c)[r.id] for r in rows)
        assert not outside or hit(c, x) is None


@quick
@given(rows=worlds(smallest=1), metric=st.sampled_from(["euclidean", "cosine"]))
def test_02_self_hit_right_after_insertion(rows: list[Row], metric: Any) -> None:
    c = Codebook(3, metric)
    for r in (r for r in rows if any(r.key)):
        add(c, r)
        row = int(c.retrieve(torch.tensor([r.key]).float())[0][0])
        assert row >= 0
        assert c.entries[row].label == r.label
        assert c.entries[row].event_id == r.id or r.id in c.members(c.entry_of(row)) or same_direction(c, row, r)


def same_direction(c: Codebook, row: int, r: Row) -> bool:
    """Two keys of one label at distance 0: the older answers, whether or not it absorbed the newer."""
    return float((c.keys[row] - torch.tensor(r.key)).norm()) == 0 or c.metric == "cosine"


def test_03_the_boundary_hits_and_the_next_number_misses() -> None:
    c = book([Row("a", (0.0, 0, 0), 3.0, (1,))])
    assert hit(c, (3.0, 0, 0)) == "a"
    assert hit(c, (float(torch.nextafter(torch.tensor(3.0), torch.tensor(4.0))), 0, 0)) is None


def test_04_an_empty_codebook_never_fires() -> None:
    c = Codebook(3)
    assert hits(c, [(0, 0, 0), (1, 2, 3)]) == [None, None]
    assert c.retrieve(torch.zeros(2, 3))[1].tolist() == [math.inf, math.inf]
    c = book([Row("a", (0.0, 0, 0), 1.0, (1,))])
    c.remove(["a"])
    assert hit(c, (0, 0, 0)) is None


@quick
@given(rows=worlds(positive=0, unique=True), new=new_row(), xs=queries)
def test_06_a_farther_key_changes_no_hit_that_it_does_not_shrink(rows: list[Row], new: Row, xs: list) -> None:
    c = book(rows)
    before, reach = {x: hit(c, x) for x in xs}, radii(c)
    at = {r.id: r.key for r in rows}
    add(c, new)
    for x, who in before.items():
        if who and math.dist(x, new.key) > math.dist(x, at[who]) and radii(c)[who] == reach[who]:
            assert hit(c, x) == who


@quick
@given(rows=worlds(), new=new_row(2))
def test_07_no_action_at_a_distance(rows: list[Row], new: Row) -> None:
    check_07_no_action_at_a_distance(rows, new)


@quick
@given(rows=worlds(positive=0, unique=True), new=new_row(), xs=queries)
def test_08_a_miss_outside_the_new_ball_stays_a_miss(rows: list[Row], new: Row, xs: list) -> None:
    c = book(rows)
    before = hits(c, xs)
    add(c, new)
    for x, was in zip(xs, before):
        if was is None and math.dist(x, new.key) > radii(c)["new"]:
            assert hit(c, x) is None


@quick
@given(rows=worlds(positive=0, unique=True), new=new_row(), xs=queries, rule=rules)
def test_09_what_is_lost_lay_in_a_shrunk_shell_or_in_a_hole(rows: list[Row], new: Row, xs: list, rule: Any) -> None:
    if any(new.key == r.key for r in rows):
        return
    c = book(rows, rule=rule)
    before, reach = hits(c, xs), radii(c)
    add(c, new)
    for x, who in zip(xs, before):
        if who is not None and hit(c, x) is None:
            shell = any(radii(c)[r.id] < math.dist(x, r.key) <= reach[r.id] for r in rows)
            at = next(r.key for r in rows if r.id == who)
            hole = rule == "nearest-then-check" and math.dist(x, new.key) < math.dist(x, at)
            assert shell or hole


@quick
@given(rows=worlds(positive=0, unique=True), xs=queries, rng=st.randoms(use_true_random=False), rule=rules)
def test_10_the_order_of_insertion_does_not_matter(rows: list[Row], xs: list, rng: Any, rule: Any) -> None:
    other = list(rows)
    rng.shuffle(other)
    a, b = book(rows, rule=rule), book(other, rule=rule)
    assert radii(a) == radii(b)
    for x in xs:
        d = sorted(math.dist(x, r.key) for r in rows)
        tie = any(p == q for p, q in pairwise(d))
        assert tie or hit(a, x) == hit(b, x)


@quick
@given(rows=worlds(), new=new_row(3), nulls=st.lists(grid, max_size=3))
def test_11_delete_restores_every_field(rows: list[Row], new: Row, nulls: list) -> None:
    c = book(rows, nulls=torch.tensor(nulls, dtype=torch.float).reshape(-1, 3))
    before = fields(c)
    add(c, new)
    c.remove(["new"])
    assert all(torch.equal(x, y[: len(x)]) for x, y in zip(before, fields(c)))
    assert not c.alive[-1]


def fields(c: Codebook) -> list[torch.Tensor]:
    return [c.silenced, c.keys, c.raw, c.caps, c.capped_by, c.alive, c.superseded, c.radii]


@quick
@given(rows=worlds(smallest=2), gone=st.sets(st.integers(0, 7), min_size=1), xs=queries)
def test_11_taking_any_rows_out_leaves_what_would_be_without_them(rows: list[Row], gone: set[int], xs: list) -> None:
    c = book(rows)
    c.remove([r.id for i, r in enumerate(rows) if i in gone])
    fresh = book([r for i, r in enumerate(rows) if i not in gone])
    assert radii(c) == radii(fresh)
    assert hits(c, xs) == hits(fresh, xs)


@pytest.mark.parametrize("ids", [["nobody"], ["a", "nobody"], ["out"]])
def test_12_an_unknown_or_removed_row_cannot_be_removed_and_nothing_changes(ids: list[str]) -> None:
    c = book([Row("a", (0.0, 0, 0), 2.0, (1,)), Row("out", (9.0, 0, 0), 2.0, (1,))])
    c.remove(["out"])
    before = c.state()
    with pytest.raises(KeyError, match=ids[-1]):
        c.remove(ids)
    after = c.state()
    assert all(torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items())


@quick
@given(rows=worlds())
def test_18_balls_of_different_answers_are_disjoint(rows: list[Row]) -> None:
    c = book(rows)
    for a, b in combinations([r for r in rows if radii(c)[r.id] >= 0], 2):
        if a.label != b.label:
            assert radii(c)[a.id] + radii(c)[b.id] <= math.dist(a.key, b.key)


def test_18_the_same_key_with_two_answers_leaves_the_newer() -> None:
    c = book([Row("old", (0.0, 0, 0), 2.0, (1,))])
    assert add(c, Row("new", (0.0, 0, 0), 2.0, (2,))) == ["old"]
    assert hit(c, (0, 0, 0)) == "new"
    assert c.history("new") == ["old"]


@quick
@given(rows=worlds(smallest=1), x=grid)
def test_26_of_equal_distances_the_oldest_answers(rows: list[Row], x: tuple) -> None:
    pairs = [Row(f"{r.id}-{n}", r.key, 20.0, (1,)) for r in rows for n in range(2)]
    c = book(pairs)
    d = min(math.dist(r.key, x) for r in pairs)
    assert hit(c, x) in (None, next(r.id for r in pairs if math.dist(r.key, x) == d))


def test_32_labels_are_token_sequences() -> None:
    check_32_labels_are_token_sequences()


@quick
@given(rows=worlds(smallest=1), pick=st.integers(0, 7), xs=queries)
def test_37_the_same_edit_twice_is_at_most_a_member(rows: list[Row], pick: int, xs: list) -> None:
    r = rows[pick % len(rows)]
    c = book([x for x in rows if x.label == r.label])
    before = [c.entry_of(i) if i >= 0 else None for i in c.retrieve(torch.tensor(xs).float())[0].tolist()]
    add(c, Row("again", r.key, r.raw, r.label, r.positive))
    assert before == [c.entry_of(i) if i >= 0 else None for i in c.retrieve(torch.tensor(xs).float())[0].tolist()]
    assert c.entries[-1].member_of is not None


def test_38_revise_and_revert() -> None:
    c = book([Row("A", (0.0, 0, 0), 2.0, (1,))])
    add(c, Row("B", (0.0, 0, 0), 1.0, (2,)))
    log = list(c.log)
    assert hit(c, (0, 0, 0)) == "B"
    for gone, left in (("B", "A"), ("A", None)):
        c.remove([gone])
        assert hit(c, (0, 0, 0)) == left
        assert c.log[: len(log)] == log and len(c.log) == len(log) + 1
        log = list(c.log)


@quick
@given(rows=worlds(), nulls=st.lists(grid, max_size=6), more=st.lists(grid, max_size=3), xs=queries)
def test_39_nulls_only_silence(rows: list[Row], nulls: list, more: list, xs: list) -> None:
    few, many = (book(rows, nulls=torch.tensor(n, dtype=torch.float).reshape(-1, 3)) for n in (nulls, nulls + more))
    for a, b in zip(hits(few, xs), hits(many, xs)):
        assert b in (a, None)
    for r in rows:
        if radii(many)[r.id] >= 0:
            assert hit(many, r.key) is not None
