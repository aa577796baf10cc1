"""A codebook measures only the distances that matter: what comes out is what comes out when it measures all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.editors.codebook import codebook
from testbed.editors.codebook.codebook import Codebook, Entry
from testbed.editors.codebook.nearest import Keys, to_all
from tests.reference.codebook import EXAMPLES

FIELDS = ("raw", "caps", "alive", "superseded", "capped_by")


def no_choice(active: Tensor, rival: Tensor, positive: Tensor, both: Tensor, *_: Tensor) -> Tensor:
    """Bounds under which every active row within the sum of radii or a positive radius is measured."""
    return torch.where(active, torch.maximum(both, positive), -1.0)


def grown(seed: int, metric: Any, n: int = 40) -> Codebook:
    """Insertions and some removals of keys that crowd each other, with balls of all sizes and few labels."""
    g = torch.Generator().manual_seed(seed)
    book, alive = Codebook(3, metric), []
    for i in range(n):
        width = float(torch.rand((), generator=g)) * (0.4 if metric == "cosine" else 2.0)
        positive = float(torch.rand((), generator=g)) * width * (i % 3 == 0)
        label = (int(torch.randint(3, (), generator=g)),)
        book.insert(torch.randn(3, generator=g), width, Entry(f"e{i}", label, positive=positive))
        alive.append(f"e{i}")
        if i % 5 == 4:
            book.remove([alive.pop(int(torch.randint(len(alive), (), generator=g)))])
    return book


@pytest.mark.ci
@settings(max_examples=max(1, EXAMPLES // 4), deadline=None)  # one example tries forty insertions and what they do to one another
@given(seed=st.integers(0, 2**32), metric=st.sampled_from(["euclidean", "cosine"]))
def test_measuring_what_matters_gives_what_measuring_all_gives(seed: int, metric: Any) -> None:
    chosen = grown(seed, metric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codebook, "distance_bounds", no_choice)
        whole = grown(seed, metric)
    for name in FIELDS:
        assert torch.equal(getattr(chosen, name), getattr(whole, name)), name
    assert chosen.entries == whole.entries  # and so who was whose member


def test_a_small_ball_that_is_not_met_does_not_hide_a_wide_one_behind_it() -> None:
    book = Codebook(1)
    book.insert(torch.tensor([1.0]), 0.1, Entry("small", (1,)))
    book.insert(torch.tensor([-3.0]), 2.9, Entry("wide", (1,)))
    assert book.overlapping(torch.tensor([0.0]), 0.2, (1,)) == "wide"


def test_the_binding_cap_is_found_when_a_nearer_row_is_superseded_at_once() -> None:
    """The row at 0.5 would bind, and goes; what then binds was not the nearest."""
    book = Codebook(1)
    for at, name in ((0.5, "goes"), (2.0, "binds"), (9.0, "far")):
        book.insert(torch.tensor([at]), 3.0, Entry(name, (1,)))
    assert book.insert(torch.tensor([0.0]), 3.0, Entry("new", (2,), positive=0.6)) == ["goes"]
    assert book.capped_by.tolist()[-1] == 1
    assert float(book.caps[-1]) == pytest.approx(1.0)


def test_few_rows_are_measured_where_all_balls_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    exact = Keys.exact

    def counted(self: Keys, key: Tensor, wanted: Tensor) -> Tensor:
        measured.append(int(wanted.sum()))
        return exact(self, key, wanted)

    monkeypatch.setattr(Keys, "exact", counted)
    g = torch.Generator().manual_seed(0)
    book = Codebook(32)
    for i in range(300):
        book.insert(torch.randn(32, generator=g), 20.0, Entry(f"e{i}", (i,)))
    assert len(measured) == 300 and sum(measured[100:]) < 0.1 * sum(range(100, 300))


@pytest.mark.parametrize("rule", ["nearest-then-check", "containing-nearest"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_superseded_rows_are_not_searched_and_come_back_when_they_are_active_again(metric: Any, rule: Any) -> None:
    g = torch.Generator().manual_seed(0)
    book, keys = Codebook(5, metric, rule), torch.randn(20, 5, generator=g)
    queries = keys.repeat(2, 1) + 0.02 * torch.randn(40, 5, generator=g)
    for year in range(6):
        for i, key in enumerate(keys):
            book.insert(key, 0.05, Entry(f"{year}:{i}", (year,), positive=0.01))
            assert int(book.active.sum()) <= len(book._keys.rows) <= 2 * int(book.active.sum())
    row, distance = book.retrieve(queries)
    assert {book.entries[i].event_id[0] for i in row.tolist() if i >= 0} == {"5"} and bool((row >= 0).any())
    book.remove([f"{year}:{i}" for year in (3, 4, 5) for i in range(20)])
    again, same = book.retrieve(queries)
    assert again.tolist() == [i - 60 if i >= 0 else i for i in row.tolist()] and torch.equal(distance, same)
    assert int(book._keys.rows.max()) < 60
    fresh = Codebook(5, metric, rule)
    fresh.load(book.state())
    assert len(fresh._keys.rows) == 20 and torch.equal(fresh.retrieve(queries)[0], again)


@settings(max_examples=EXAMPLES, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-3, 1.0, 1e4]), metric=st.sampled_from(["euclidean", "cosine"]))
def test_every_distance_lies_between_its_bounds(seed: int, scale: float, metric: Any) -> None:
    g = torch.Generator().manual_seed(seed)
    keys = Keys(scale * torch.randn(50, 7, generator=g), metric)
    key = keys.all[3] if seed % 2 else scale * torch.randn(7, generator=g)
    low, high = keys.bounds(key)
    distance = to_all(keys.all, key, metric)
    assert bool((low <= distance).all() and (distance <= high).all())
    keys.search_among(torch.arange(50) % 5 == 0)
    low, high = keys.bounds(key)
    assert bool((low <= distance).all() and (distance <= high).all()) and int(high.isfinite().sum()) == 10


def test_bounds_of_what_overflows_say_nothing() -> None:
    low, high = Keys(torch.tensor([[0.0, 0.0], [2e19, 0.0]])).bounds(torch.tensor([-2e19, 0.0]))
    assert low.tolist() == [0.0, 0.0] and high.tolist() == [torch.inf, torch.inf]
