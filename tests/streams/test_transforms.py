"""Laws of schedules: what is drawn, what is put in another order, what is merged."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.arrange import arrange, by_rank, by_subject
from streams.base import BURSTS_RANGE, BadStream, Order, StreamConfig
from streams.files.records import distinct, normalize
from streams.transforms import (
    MAX_CHANGES,
    EditableFact,
    FactChange,
    Shares,
    calendar,
    changes,
    dated,
    drifting,
    generator,
    hash_fraction,
    shuffled,
)
from testbed.core.events import EditEvent, check_order
from testbed.core.registry import STREAMS

WORDS = ["cat", "dog", "The Cat!", "fish", "bird", "horse", "mouse", "Fish"]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[EditableFact], Shares, dict[str, list[str]], int]:
    n = draw(st.integers(0, 12))
    facts = []
    for i in range(n):
        previous = draw(st.none() | st.just("rat"))
        facts.append(
            EditableFact(f"q{i}?", draw(st.sampled_from(WORDS)), f"record {i}", None, previous, f"s{i}", draw(st.sampled_from("ab")))
        )
    parts = draw(st.lists(st.floats(0, 0.33), min_size=3, max_size=3))
    repeats = draw(st.sampled_from([1, 1, 2, 6]))
    values = {c: draw(st.lists(st.sampled_from(WORDS), max_size=6)) for c in "ab"}
    return facts, Shares(*parts, repeats=repeats), values, draw(st.integers(0, 2**32 - 1))


def build(case: tuple[list[EditableFact], Shares, dict[str, list[str]], int], k: int | None = None) -> list[EditEvent]:
    facts, shares, values, seed = case
    order = shuffled(len(facts), generator(seed, "order"))
    stream = changes((facts[i] for i in order), shares, values, generator(seed, "changes"))
    return list(islice(dated(stream, calendar(7, 0.0, generator(seed, "years"))), k))


@settings(max_examples=200, deadline=None)
@given(schedules())
def test_the_changes_of_a_fact_are_consistent(case: tuple[list[EditableFact], Shares, dict[str, list[str]], int]) -> None:
    events = build(case)
    check_order(events)
    lives: dict[str, list[EditEvent]] = {}
    for e in events:
        lives.setdefault(e.source, []).append(e)
    assert lives.keys() == {f.source for f in case[0]}
    for life in lives.values():
        assert len(life) <= max(MAX_CHANGES, case[1].repeats)
        assert [e.kind == "add" for e in life] == [True] + [False] * (len(life) - 1)
        _follow(life)


def _follow(life: list[EditEvent]) -> None:
    values = [v for v in (life[0].previous, life[0].target) if v is not None]
    for before, e in pairwise(life):
        assert before.kind != "retire"
        assert (e.revises, e.previous) == (before.id, values[-1])
        had = {normalize(v) for v in values}
        if e.kind == "retire":
            assert e.target == ""
            assert values[-1] != life[0].previous
        else:
            assert normalize(e.target) != normalize(values[-1])
            assert (normalize(e.target) in had) == (e.kind == "revert")
            values.append(e.target)


@settings(max_examples=100, deadline=None)
@given(schedules(), st.integers(0, 30))
def test_a_prefix_is_a_prefix(case: tuple[list[EditableFact], Shares, dict[str, list[str]], int], k: int) -> None:
    assert build(case, k) == build(case)[:k]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=40), st.integers(0, 2**32 - 1))
def test_orders_are_permutations(categories: list[str], seed: int) -> None:
    for order in (drifting(categories, generator(seed, "x")), shuffled(len(categories), generator(seed, "x"))):
        assert sorted(order) == list(range(len(categories)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=6), max_size=8), st.lists(st.text(min_size=1, max_size=6), max_size=4))
def test_distinct_keeps_the_first_of_equals(texts: list[str], taken: list[str]) -> None:
    out = distinct(texts, taken)
    assert len({normalize(t) for t in out}) == len(out)
    assert {normalize(t) for t in out} == {normalize(t) for t in texts} - {normalize(t) for t in taken}


def test_drift_moves_the_mix() -> None:
    categories = [c for c in "abcdefgh" for _ in range(200)]
    gaps = []
    for seed in range(5):
        for order in (drifting(categories, generator(seed, "o")), shuffled(len(categories), generator(seed, "o"))):
            names = [categories[i] for i in order]
            early, late = Counter(names[:400]), Counter(names[-400:])
            gaps.append(sum(abs(early[c] - late[c]) for c in "abcdefgh") / 800)
    assert min(gaps[0::2]) > 0.3
    assert max(gaps[1::2]) < 0.2


def test_drift_starts_at_its_first_mix() -> None:
    categories = [c for c in "abcd" for _ in range(20_000)]
    rng = generator(5, "o")
    rng.permutation(len(categories))
    a = rng.normal(0.0, 2.0, (2, 4))[0]
    early = Counter(categories[i] for i in islice(drifting(categories, generator(5, "o")), 2000))
    expected = np.exp(a) / np.exp(a).sum()
    assert np.allclose([early[c] / 2000 for c in "abcd"], expected, atol=0.05)


def test_drawn_shares_match_the_configured_ones() -> None:
    facts = (EditableFact(f"q{i}", f"t{i}", f"r{i}", relation="a", previous=f"p{i}") for i in range(100_000))
    values = {"a": [f"t{i}" for i in range(500)]}
    drawn = islice(changes(facts, Shares(0.15, 0.03, 0.02), values, generator(0, "x")), 10_000)
    kinds = Counter(c.kind for c in drawn)
    for kind, expected in {"add": 0.8, "revise": 0.15, "revert": 0.03, "retire": 0.02}.items():
        assert kinds[kind] / 10_000 == pytest.approx(expected, abs=0.012)


def test_a_hash_fraction_is_uniform_and_fixed() -> None:
    values = np.array([hash_fraction("x", i) for i in range(4000)])
    assert (values >= 0).all()
    assert (values < 1).all()
    assert np.histogram(values, 10, (0, 1))[0].min() > 330
    assert hash_fraction("x", 1) == hash_fraction("x", 1) != hash_fraction("y", 1)


def test_dates_count_from_year_one() -> None:
    fact = [EditableFact(f"q{i}", "t", f"r{i}") for i in range(21)]
    events = list(dated((FactChange("add", f, f.target, None) for f in fact), calendar(10, 0.0, generator(0, "years"))))
    assert [e.year for e in events] == [1] * 10 + [2] * 10 + [3]
    assert [events[0].time, events[5].time, events[20].time] == [1.0, 1.5, 3.0]


# uneven years and values in a row ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.just(0.0) | st.floats(*BURSTS_RANGE), st.integers(0, 2**32 - 1))
def test_a_calendar_rises_and_leaves_no_year_out(per_year: int, bursts: float, seed: int) -> None:
    times = list(islice(calendar(per_year, bursts, generator(seed, "years")), 400))
    assert times == list(islice(calendar(per_year, bursts, generator(seed, "years")), 500))[:400]
    assert all(a < b for a, b in pairwise(times))
    assert sorted({int(t) for t in times}) == list(range(1, int(times[-1]) + 1))


def test_bursts_keep_the_mean_and_have_the_configured_spread() -> None:
    for bursts in (0.5, 1.0):
        times = islice(calendar(40, bursts, generator(3, "years")), 100_000)
        sizes = np.array(list(Counter(map(int, times)).values())[:-1])
        assert sizes.mean() == pytest.approx(40, rel=0.06)
        assert sizes.std() == pytest.approx(40 * bursts, rel=0.08)


def test_repeats_follow_their_addition_at_once() -> None:
    facts = [EditableFact(f"q{i}", f"t{i}", f"r{i}", relation="a") for i in range(40)]
    drawn = list(changes(facts, Shares(repeats=3), {"a": [f"v{i}" for i in range(9)]}, generator(0, "x")))[:120]
    assert [c.kind for c in drawn] == ["add", "revise", "revise"] * 40
    assert all(len({c.fact.source for c in drawn[i : i + 3]}) == 1 for i in range(0, 120, 3))


@pytest.mark.parametrize("name", ["world-yearly", "okedit-yearly"])
def test_the_world_has_the_same_schedules(name: str) -> None:
    def events(**config: Any) -> list[EditEvent]:
        stream = STREAMS.get(name)(StreamConfig(**config))
        found = stream.events(300)
        check_order(found)
        assert STREAMS.get(name)(StreamConfig(**config)).events(100) == found[:100]
        return found

    plainly, uneven = events(), events(bursts=0.8)
    assert [e.id for e in plainly] == [e.id for e in uneven]
    assert len(set(Counter(e.year for e in uneven).values())) > 3
    repeated = events(repeats=4)
    adds = [e.seq for e in repeated if e.kind == "add" and e.seq < 296]
    assert all(repeated[i + k].fact == repeated[i].fact for i in adds for k in (1, 2, 3))
    drifted = events(drift=True, revise=0.0, retire=0.0, revert=0.0)
    mixes = [Counter(e.relation for e in part) for part in (drifted[:150], drifted[150:])]
    apart = sum(abs(mixes[0][r] - mixes[1][r]) for r in mixes[0] | mixes[1])
    calm = [Counter(e.relation for e in part) for part in (plainly[:150], plainly[150:])]
    assert apart > 1.5 * sum(abs(calm[0][r] - calm[1][r]) for r in calm[0] | calm[1])


# another order of the edits that a run takes -----------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(schedules(), st.integers(0, 40), st.randoms(use_true_random=False))
def test_another_order_holds_the_same_edits(
    case: tuple[list[EditableFact], Shares, dict[str, list[str]], int], k: int, random: Any
) -> None:
    events = build(case, k)
    rank = {e.id: random.choice([0.0, 1.0, random.random()]) for e in events if e.revises is None}
    for moved in (by_rank(events, rank), by_subject(events)):
        assert Counter(e.id for e in moved) == Counter(e.id for e in events)
        check_order([_at(e, i) for i, e in enumerate(moved)])
    firsts = [rank[e.id] for e in by_rank(events, rank) if e.revises is None]
    assert firsts == sorted(firsts)
    subjects = [e.subject for e in by_subject(events)]
    assert sum(a != b for a, b in pairwise(subjects)) == max(0, len(set(subjects)) - 1)


def _at(event: EditEvent, i: int) -> EditEvent:
    parts = {f: getattr(event, f) for f in event.__dataclass_fields__} | {"seq": i, "time": 1.0 + i}
    return EditEvent(**parts)


@pytest.mark.parametrize("order", get_args(Order))
def test_arranging_keeps_dates_in_order_and_ids(order: Any) -> None:
    stream = STREAMS.get("world-yearly")(StreamConfig(order=order, bursts=0.5))
    drawn = stream.events(120)
    asked: list[EditEvent] = []

    def losses(adds: Any) -> dict[str, float]:
        asked.extend(adds)
        return {e.id: float(len(e.target)) for e in adds}

    moved = arrange(stream, drawn, losses)
    check_order(moved)
    assert [e.time for e in moved] == [e.time for e in drawn]
    assert {e.id for e in moved} == {e.id for e in drawn}
    assert (moved == drawn) == (order == "drawn")
    assert bool(asked) == (order in ("hardest", "easiest"))
    lengths = [len(e.target) for e in moved if e.kind == "add"]
    assert order not in ("hardest", "easiest") or lengths == sorted(lengths, reverse=order == "hardest")
    assert all(stream.questions(e) for e in moved[:20])


def test_real_dates_are_given_up_and_not_moved(data_root: Path) -> None:
    stream = STREAMS.get("leaders")(StreamConfig(data_root=data_root / "reign", order="subjects"))
    moved = arrange(stream, stream.events(200), lambda adds: {})
    check_order(moved)
    assert stream.time_axis == stream.manifest()["time_axis"] == "scheduled"
    assert [moved[0].year, moved[-1].year] == [1, 4]


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(BadStream, match=r"repeats must be 1 or more, got 0; stream.bursts must be 0 or lie in \[0.01, 3.0\]"):
        STREAMS.get("world-yearly")(StreamConfig(repeats=0, bursts=4.0))
