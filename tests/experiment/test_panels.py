"""Panels of ageing and of what no edit is about: who belongs, when they are asked, what they weigh."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.core.events import Question
from testbed.core.registry import PROBES
from testbed.experiment.schedule import Schedule, ScheduleConfig, ScheduledQuestion, build, checkpoints
from testbed.probes.base import EditHistory, ProbeConfig, draw
from testbed.probes.coming import SHARE as COMING
from testbed.probes.ladder import SHARE
from tests.helpers.plain_stream import Line, PlainStream, plain

WAITS = settings(max_examples=15, deadline=None)


def schedule(stream: PlainStream, batch: int = 1, seed: int = 0, budget: int = 10**6) -> Schedule:
    return build(stream, stream.all, ScheduleConfig(batch, seed, budget))


def of_panel(planned: Schedule, panel: str) -> list[tuple[int, ScheduledQuestion]]:
    return [(s.checkpoint.step, a) for s in planned.steps for a in s.questions if a.plan.panel == panel]


def flat(n: int) -> PlainStream:
    """n edits of one year, none replaced."""
    return PlainStream([Line(1 + i / (2 * n)) for i in range(n)])


def test_the_cohort_is_asked_at_ages_by_hand() -> None:
    """Edits one at a time: an edit of age a is asked when a is 0 or a power of two, and at no other age."""
    planned = schedule(flat(300))
    ages: dict[str, list[int]] = defaultdict(list)
    for step, a in of_panel(planned, "cohort_ladder"):
        assert a.plan.edit is not None
        ages[a.plan.edit.event.id].append(step - a.plan.edit.position)
    members = {e.id for e in flat(300).all if draw(0, "ladder", e.id) < SHARE}
    assert set(ages) == members
    assert 10 < len(members) < 60
    powers = [0, *(2**k for k in range(9))]
    for edit in (a for s in planned.steps for a in s.edits if a.event.id in members):
        assert ages[edit.event.id] == [p for p in powers if edit.position + p <= 300]


@WAITS
@given(st.integers(1, 30), st.integers(20, 200))
def test_a_batch_is_asked_once_for_all_the_ages_it_passes(batch: int, n: int) -> None:
    """Every age 0, 1, 2, 4, ... that was reached was reached at exactly one step, and that step asks."""
    stream = flat(n)
    planned = schedule(stream, batch)
    asked = {(step, a.plan.edit.event.id) for step, a in of_panel(planned, "cohort_ladder") if a.plan.edit}
    ends = {m.step: m.edits for m, _ in checkpoints(stream.all, batch)}
    due = set()
    for i, e in enumerate(stream.all, 1):
        if draw(0, "ladder", e.id) < SHARE:
            for age in (0, *(2**k for k in range(10))):
                reached = [step for step, edits in ends.items() if edits - i >= age]
                due |= {(reached[0], e.id)} if reached else set()
    assert asked == due
    assert len(of_panel(planned, "cohort_ladder")) == len(asked)


def test_a_replaced_edit_leaves_the_cohort() -> None:
    stream = PlainStream([Line(1 + i / 1000, i - 200 if i >= 200 else None, "add" if i < 200 else "revise") for i in range(400)])
    planned = schedule(stream)
    gone = planned.superseded
    asked = [(step, a.plan.edit.event.id) for step, a in of_panel(planned, "cohort_ladder") if a.plan.edit]
    assert {e for _, e in asked} & set(gone)
    assert all(step < gone.get(edit, step + 1) for step, edit in asked)


def test_the_share_of_the_cohort_is_its_inclusion_probability_and_shrinks_with_the_budget() -> None:
    wide, tight = schedule(plain(300, per_year=100)), schedule(plain(300, per_year=100), budget=3200)
    assert tight.scale < 1
    members = []
    for planned in (wide, tight):
        found = of_panel(planned, "cohort_ladder")
        assert {a.plan.incl_prob for _, a in found} == {SHARE * planned.scale}
        members.append({a.plan.edit.event.id for _, a in found if a.plan.edit})
    assert members[1] < members[0]


def test_over_many_ids_a_tenth_belongs() -> None:
    assert sum(draw(5, "ladder", str(i)) < SHARE for i in range(20_000)) / 20_000 == pytest.approx(SHARE, abs=0.01)


@pytest.mark.parametrize("panel", ["cohort_ladder", "rotating_fresh", "fixed_unrelated"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_longer_stream_extends_a_panel(panel: str, batch: int) -> None:
    """What both streams ask at a step is the same; only the shorter one's end is a moment of its own."""
    short, long = schedule(plain(45), batch), schedule(plain(135), batch)
    end = short.steps[-1].checkpoint.step
    first = [x for x in of_panel(short, panel) if x[0] < end]
    assert first
    assert first == [x for x in of_panel(long, panel) if x[0] < end]


@pytest.mark.parametrize("panel", ["rotating_fresh", "fixed_unrelated"])
def test_panels_of_unrelated_questions_weigh_back_to_the_pool(panel: str) -> None:
    stream = plain(40)
    pool = {(q.prompt, q.topic) for q in stream.general() if q.split == "general"}
    planned = schedule(stream)
    by_step: dict[int, list[ScheduledQuestion]] = defaultdict(list)
    for step, a in of_panel(planned, panel):
        by_step[step].append(a)
    assert sorted(by_step) == [s.checkpoint.step for s in planned.steps if s.checkpoint.full]
    for asked in by_step.values():
        assert sum(1 / a.plan.incl_prob for a in asked) == pytest.approx(len(pool))
        assert len({a.plan.question.id for a in asked}) == len(asked) == min(len(pool), 64 if panel == "rotating_fresh" else 48)
        for a in asked:
            q = a.plan.question
            assert (q.prompt, q.topic) in pool
            assert (q.split, q.answer, q.aliases, q.event_id) == ("locality_far", None, (), None)


class Wide(PlainStream):
    """A plain stream with 2,000 general questions."""

    def general(self) -> tuple[Question, ...]:
        return tuple(Question("general", f"{i}?", f"{i}", topic="wide") for i in range(2000))


def test_the_fixed_panel_stays_and_the_fresh_one_does_not() -> None:
    planned = schedule(Wide([Line(1 + i / 10) for i in range(300)]))
    fixed, fresh = (defaultdict(set), defaultdict(set))
    for name, by in (("fixed_unrelated", fixed), ("rotating_fresh", fresh)):
        for step, a in of_panel(planned, name):
            by[step].add(a.plan.question.id)
    assert len(fresh) == len(fixed) == 30
    assert len({frozenset(x) for x in fixed.values()}) == 1
    panels = list(fresh.values())
    overlaps = [len(a & b) for i, a in enumerate(panels) for b in panels[:i]]
    assert statistics.mean(overlaps) == pytest.approx(64 * 64 / 2000, rel=0.15)
    counts = Counter(q for panel in panels for q in panel)
    assert len(counts) == pytest.approx(2000 * (1 - (1 - 64 / 2000) ** 30), rel=0.05)


def test_where_a_stream_has_no_general_questions_the_far_ones_of_live_edits_stand_in() -> None:
    class Bare(PlainStream):
        def general(self) -> tuple[Question, ...]:
            return ()

    planned = schedule(Bare([Line(1 + i / 10) for i in range(25)]))
    asked = of_panel(planned, "rotating_fresh")
    assert {a.plan.question.split for _, a in asked} == {"locality_far"}
    assert {a.plan.question.event_id for _, a in asked} == {None}
    far = {q.prompt for e in planned.steps for x in e.edits for q in Bare([]).questions(x.event) if q.split == "locality_far"}
    assert {a.plan.question.prompt for _, a in asked} <= far


def test_a_stream_without_anything_unrelated_asks_nothing() -> None:
    past = EditHistory((), (), lambda e: (), (), 0)
    full, _ = list(checkpoints(flat(3).all, 1))[-1]
    for name in ("fresh", "unrelated", "ladder"):
        assert PROBES.get(name)().ask(past, full) == []
    assert PROBES.get("fresh")().ask(past, replace(full, reasons=frozenset({"power"}))) == []


@WAITS
@given(st.integers(1, 7), st.integers(3, 120), st.integers(0, 3))
def test_before_a_year_begins_its_first_edits_are_asked_by_their_draw(batch: int, n: int, seed: int) -> None:
    """Every third edit replaces the one before it, and is not asked before its time."""
    stream = PlainStream([Line(1 + i * 4 / n, *((i - 1, "revise") if i % 3 == 2 else ())) for i in range(n)])
    planned = schedule(stream, batch, seed)
    asked = {(step, a.plan.edit.event.id) for step, a in of_panel(planned, "coming_year") if a.plan.edit}
    ends = {s.edits[-1].event.year: s.checkpoint.step for s in planned.steps}
    years = sorted(ends)
    due = set()
    for before, year in pairwise(years):
        first = (e for e in stream.all if e.year == year and e.revises is None)
        due |= {(ends[before], e.id) for e in first if draw(seed, "coming", e.id) < COMING}
    assert asked == due
    assert all(a.plan.incl_prob == COMING and a.plan.question.split == "edit" for _, a in of_panel(planned, "coming_year"))


def test_a_smaller_budget_asks_a_part_of_the_coming_edits() -> None:
    stream = plain(500, per_year=50)
    free, tight = (of_panel(schedule(stream, budget=b), "coming_year") for b in (10**6, 3000))
    shares = {a.plan.incl_prob for _, a in tight}
    assert len(shares) == 1
    assert shares.pop() < COMING
    assert {a.plan.question.id for _, a in tight} < {a.plan.question.id for _, a in free}


@pytest.mark.parametrize("topics", [3, 10, 40])
def test_a_general_panel_has_at_most_ten_groups_and_keeps_to_a_small_budget(topics: int) -> None:
    class Topics(PlainStream):
        def general(self) -> tuple[Question, ...]:
            return tuple(Question("general", f"{t} {i}?", f"{i}", topic=f"topic {t:02}") for t in range(topics) for i in range(60 - t))

    def panel(budget: int) -> list[ScheduledQuestion]:
        lines = [Line(1 + i / 100) for i in range(60)]
        return [x for _, x in of_panel(build(Topics(lines), Topics(lines).events(60), ScheduleConfig(budget=budget)), "fixed_general")]

    whole, small = panel(8000), panel(20)
    groups = min(topics, 10)
    assert len(whole) == 10 * groups
    assert 2 * min(groups, 3) <= len(small) < 8 + groups < len(whole)
    assert {x.plan.question.id for x in small} <= {x.plan.question.id for x in whole}
    weights = sum(1 / x.plan.incl_prob for x in whole)
    assert weights == pytest.approx(len(Topics([]).general()))


@pytest.mark.parametrize(("wanted", "asked"), [(1, 1), (2, 2), (5, 2)])
def test_text_generality_asks_as_many_paraphrases_as_the_run_wants_and_the_stream_has(wanted: int, asked: int) -> None:
    stream = flat(60)
    planned = build(stream, stream.all, ScheduleConfig(budget=10**6, asked=ProbeConfig(paraphrases=wanted)))
    number: Counter[tuple[int, str, str]] = Counter()
    for step, a in of_panel(planned, "age_mixed") + of_panel(planned, "immediate"):
        if a.plan.edit is not None and a.probe in ("generality", "right_after"):
            number[step, a.plan.edit.event.id, a.plan.question.split + a.plan.panel] += 1
    assert {n for (_, _, what), n in number.items() if what == "text_generalityage_mixed"} == {asked}
    assert {n for (_, _, what), n in number.items() if what != "text_generalityage_mixed"} == {1}
    one = build(stream, stream.all, ScheduleConfig(budget=10**6))
    assert set(one.unique_questions) <= set(planned.unique_questions)
    assert (one.hash == planned.hash) == (wanted == 1)


def test_the_panels_of_the_last_checkpoint_grow_on_request_within_the_same_budget() -> None:
    stream = PlainStream([Line(1 + i / 30) for i in range(300)])

    def by_step(end: int) -> Counter[int]:
        planned = build(stream, stream.all, ScheduleConfig(batch=10, budget=3000, asked=ProbeConfig(end=end)))
        assert planned.n_questions <= 1.05 * 3000
        return Counter(step for step, x in of_panel(planned, "age_mixed"))

    even, late = by_step(1), by_step(8)
    assert late[30] > 2 * even[30]
    assert all(late[year] <= even[year] for year in range(3, 30, 3))
