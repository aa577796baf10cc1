"""Factors and keys of past edits: they grow in place, and what was handed out stays as it was."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.editors.base import appended
from testbed.editors.locate.weight_changes import WeightDeltas
from tests.helpers.models import build

sizes = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(0, 2**16))
def test_a_room_holds_the_rows_in_order_and_no_view_changes(parts: list[int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    room, want, views = torch.zeros(0, 3), torch.zeros(0, 3), []
    for n in parts:
        new = torch.randn(n, 3, generator=g)
        room, want = appended(room, len(want), new), torch.cat([want, new])
        views.append((room[: len(want)], want))
    assert all(torch.equal(view, kept) for view, kept in views)


def test_a_room_is_not_copied_for_every_row() -> None:
    room, places = torch.zeros(0, 1), set()
    for i in range(1000):
        room = appended(room, i, torch.full((1, 1), float(i)))
        places.add(room.data_ptr())
    assert len(places) < 40 and room[:1000, 0].tolist() == list(range(1000))


def _step(changes: WeightDeltas, step: int, n: int, g: torch.Generator) -> dict[str, Tensor]:
    d, f = changes.base(0).shape
    changes.add(0, step, *(torch.randn(n, width, generator=g) for width in (d, f, f)))
    return {k: v for k, v in changes.state().items() if isinstance(v, Tensor)}


def test_going_back_and_another_way_leaves_both_pasts_as_they_were() -> None:
    g = torch.Generator().manual_seed(0)
    changes = WeightDeltas(build("llama"), [0])
    for step in range(1, 4):
        _step(changes, step, 3, g)
    before = changes.state()
    kept = {k: v.clone() for k, v in before.items() if isinstance(v, Tensor)}
    one = _step(changes, 4, 2, g)
    one_kept = {k: v.clone() for k, v in one.items()}
    changes.load(before)
    other = _step(changes, 4, 2, g)
    assert sorted(kept) == ["keys.0", "left.0", "right.0"]
    for name in kept:
        assert torch.equal(before[name], kept[name]) and torch.equal(one[name], one_kept[name])
        assert torch.equal(other[name][:9], kept[name]) and not torch.equal(other[name][9:], one[name][9:])
    assert torch.equal(changes.at(3)[changes.names[0]], _replay(changes, kept))


def _replay(changes: WeightDeltas, kept: dict[str, Tensor]) -> Tensor:
    w = changes.base(0)
    for at in range(0, 9, 3):
        w = w + kept["left.0"][at : at + 3].T @ kept["right.0"][at : at + 3]
    return w


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True), max_size=8), st.sets(st.sampled_from("abcdef")))
def test_the_past_holds_the_newest_key_of_each_fact(steps: list[list[str]], changed: set[str]) -> None:
    changes, newest = WeightDeltas(build("llama"), [0]), dict[str, float]()
    d, f = changes.base(0).shape
    for step, facts in enumerate(steps, 1):
        keys = torch.stack([torch.full((f,), step + i / 10) for i in range(len(facts))])
        assert changes.knows(0, facts) == (not newest.keys().isdisjoint(facts))
        changes.add(0, step, torch.zeros(len(facts), d), torch.zeros(len(facts), f), keys)
        changes.name_keys(0, facts)
        newest.update({fact: float(k[0]) for fact, k in zip(facts, keys)})
    loaded = WeightDeltas(changes.handle, [0])
    loaded.load(changes.state())
    wanted = sorted(value for fact, value in newest.items() if fact not in changed)
    for one in (changes, loaded):
        assert [float(x) for keys in one.past(0, changed) for x in keys[:, 0]] == wanted
