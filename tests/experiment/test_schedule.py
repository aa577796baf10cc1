"""The schedule: what is asked when. Laws that hold for any stream, and the moments by hand."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.core.events import BadEvent, EditEvent, Question
from testbed.core.registry import PROBES
from testbed.experiment.schedule import GRID, Schedule, ScheduleConfig, build, checkpoints
from testbed.probes.base import FIRST_STRATUM, EditHistory, Planned, Probe, by_age, draw
from tests.helpers.plain_stream import Line, PlainStream, lines, plain

some = settings(max_examples=15, deadline=None)


@st.composite
def streams(draw_from: st.DrawFn) -> PlainStream:
    """Up to 70 edits over a few uneven years, some replacing an earlier live one, some retired."""
    out: list[Line] = []
    live: list[int] = []
    time = 0.0
    for i in range(draw_from(st.integers(1, 70))):
        time += draw_from(st.sampled_from([0.0, 0.0, 0.05, 0.3, 2.0]))
        kind = draw_from(st.sampled_from(["add", "add", "add", "revise", "revert", "retire"])) if live else "add"
        old = None if kind == "add" else live.pop(draw_from(st.integers(0, len(live) - 1)))
        out.append(Line(time, old, kind))
        live.append(i)
    return PlainStream(out)


def schedule(stream: PlainStream, batch: int = 1, seed: int = 0, budget: int = 8000) -> Schedule:
    return build(stream, stream.all, ScheduleConfig(batch, seed, budget))


@some
@given(streams(), st.integers(1, 5))
def test_each_event_is_edited_once_in_order_and_no_step_spans_two_years(stream: PlainStream, batch: int) -> None:
    planned = schedule(stream, batch)
    assert [a.event.id for s in planned.steps for a in s.edits] == [e.id for e in stream.all]
    assert [s.checkpoint.step for s in planned.steps] == list(range(1, len(planned.steps) + 1))
    for s in planned.steps:
        assert 1 <= len(s.edits) <= batch
        assert len({a.event.year for a in s.edits}) == 1
        assert all(a.step == s.checkpoint.step for a in s.edits)
        assert s.checkpoint.edits == s.edits[-1].position
        assert s.checkpoint.before == s.edits[0].position - 1


@some
@given(streams(), st.integers(1, 5))
def test_nothing_is_asked_before_it_exists_or_after_it_was_replaced(stream: PlainStream, batch: int) -> None:
    planned = schedule(stream, batch)
    made = {e.edit_id: e for e in planned.event_rows()}
    for s in planned.steps:
        for a in s.questions:
            if a.plan.edit is None:
                assert a.plan.question.event_id is None
                continue
            row = made[a.plan.edit.event.id]
            assert a.plan.question.event_id == row.edit_id
            assert row.step == a.plan.edit.step
            assert (row.step <= s.checkpoint.step) == (a.plan.panel != "coming_year")
            assert row.superseded_step is None or row.superseded_step > s.checkpoint.step


@some
@given(streams(), st.integers(1, 5))
def test_every_new_edit_that_still_stands_is_asked_right_after_its_step(stream: PlainStream, batch: int) -> None:
    for s in schedule(stream, batch).steps:
        replaced = {a.event.revises for a in s.edits}
        now = {a.plan.edit.event.id for a in s.questions if a.plan.edit and a.plan.panel == "immediate" and a.plan.question.split == "edit"}
        assert now == {a.event.id for a in s.edits} - replaced


@some
@given(streams(), st.integers(1, 4), st.integers(0, 3))
def test_the_same_plan_gives_the_same_schedule_and_the_seed_another_panel(stream: PlainStream, batch: int, seed: int) -> None:
    first, again = schedule(stream, batch, seed), schedule(PlainStream_of(stream), batch, seed)
    assert first.hash == again.hash
    assert list(first.rows()) == list(again.rows())
    assert list(first.question_rows()) == list(again.question_rows())


def PlainStream_of(stream: PlainStream) -> PlainStream:
    """The same stream made anew, so that nothing can be shared."""
    fresh = PlainStream([])
    fresh.all = list(stream.all)
    return fresh


def test_the_hash_is_pinned_and_moves_with_seed_batch_and_stream() -> None:
    hashes = [schedule(plain(40), *args).hash for args in ((1, 0), (1, 1), (2, 0))]
    hashes.append(schedule(plain(41)).hash)
    assert len(set(hashes)) == 4
    assert schedule(plain(3)).hash == "fef94fdbca803cce", (
        "the schedule has changed: raise the version of the probe that did it (a new probe starts at 1), then this hash"
    )


@some
@given(streams(), st.integers(1, 5))
def test_inclusion_probabilities_weigh_every_stratum_back_to_its_live_edits(stream: PlainStream, batch: int) -> None:
    """sum over the panel of 1 / p is the number of live edits, in all and in every stratum of ages."""
    planned = schedule(stream, batch)
    live: dict[str, int] = {}
    for s in planned.steps:
        for a in s.edits:
            live.pop(a.event.revises or "", None)
            live[a.event.id] = a.position
        by_panel: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
        for a in s.questions:
            assert 0 < a.plan.incl_prob <= 1
            if a.plan.edit is not None and a.plan.panel == "age_mixed" and a.plan.question.split == "edit":
                by_panel[a.probe, a.plan.question.split].append((s.checkpoint.edits - a.plan.edit.position, a.plan.incl_prob))
        for panel in by_panel.values():
            assert _weights(panel) == pytest.approx(Counter(_stratum(s.checkpoint.edits - p) for p in live.values()))


def _weights(panel: list[tuple[int, float]]) -> dict[int, float]:
    out: dict[int, float] = defaultdict(float)
    for age, p in panel:
        out[_stratum(age)] += 1 / p
    return out


def _stratum(age: int) -> int:
    """0 for [0, 64), 1 for [64, 128), 2 for [128, 256), ..."""
    return (age // FIRST_STRATUM).bit_length()


def test_panels_of_a_long_stream_are_drawn_from_every_stratum() -> None:
    planned = schedule(plain(700, per_year=350))
    asked = [a.plan for a in planned.steps[-1].questions if a.probe == "retention"]
    ages = Counter(_stratum(700 - p.edit.position) for p in asked if p.edit)
    assert set(ages) == {0, 1, 2, 3, 4}
    assert min(ages.values()) >= 12
    assert {p.incl_prob == 1.0 for p in asked} == {True, False}
    assert sum(1 / p.incl_prob for p in asked) == pytest.approx(700 - 175)


def test_a_panel_grows_without_dropping_anyone() -> None:
    planned = schedule(plain(300, per_year=300))
    last = planned.steps[-1]
    live = tuple(a for s in planned.steps for a in s.edits if a.event.id not in planned.superseded)
    past = EditHistory((), live, lambda e: (Question("edit", "asked?", "yes", e.id),), (), 0)
    small, large = ({a.event.id for a, _ in by_age(past, last.checkpoint, n, "edit")} for n in (60, 120))
    assert small < large


def test_a_split_of_few_edits_is_asked_of_those_that_have_it() -> None:
    """Every twentieth edit has a consequence: all of them are asked, not those that a panel drawn from all edits meets."""
    every = schedule(plain(400, per_year=400))
    live = tuple(a for s in every.steps for a in s.edits if a.event.id not in every.superseded)
    rare = {a.event.id for a in live[::20]}

    def questions(e: EditEvent) -> tuple[Question, ...]:
        edit = Question("edit", "asked?", "yes", e.id)
        return (edit, Question("portability", "so?", "so", e.id)) if e.id in rare else (edit,)

    drawn = by_age(EditHistory((), live, questions, (), 0), every.steps[-1].checkpoint, 48, "portability")
    assert {a.event.id for a, _ in drawn} == rare
    assert {p for _, p in drawn} == {1.0}
    assert not by_age(EditHistory((), live, questions, (), 0), every.steps[-1].checkpoint, 48, "stale")


def test_a_longer_stream_asks_the_same_questions_on_the_way() -> None:
    short, long = schedule(plain(45)), schedule(plain(95))
    for a, b in zip(short.steps[:-1], long.steps):
        assert a == replace(b, checkpoint=a.checkpoint)
        assert a.checkpoint == b.checkpoint


def test_the_schedule_is_made_before_any_editor_and_knows_none() -> None:
    """Nothing of an editor can reach it: its arguments are a stream, events and a plan."""
    assert set(ScheduleConfig.__dataclass_fields__) == {"batch", "seed", "budget", "benchmarks", "asked"}


def test_moments_and_reasons_by_hand() -> None:
    """Seven edits in two years (4 + 3), by twos: no step spans the boundary."""
    times = [1.0, 1.2, 1.5, 1.9, 2.0, 2.1, 2.9]
    found = [(m, [a.position for a in edits]) for m, edits in checkpoints(PlainStream([Line(t) for t in times]).all, 2)]
    assert [positions for _, positions in found] == [[1, 2], [3, 4], [5, 6], [7]]
    assert [sorted(m.reasons - {"right_after"}) for m, _ in found] == [["power"], ["power", "year"], [], ["end", "power", "year"]]
    assert [m.why for m, _ in found] == ["power", "year", "right_after", "end"]
    assert [m.time for m, _ in found] == [1.2, 1.9, 2.1, 2.9]
    assert [m.full for m, _ in found] == [False, True, False, True]


def test_a_year_without_edits_and_an_odd_batch_at_a_years_end() -> None:
    found = [(m.edits, "year" in m.reasons) for m, _ in checkpoints(PlainStream([Line(t) for t in (1.0, 1.1, 1.2, 9.0)]).all, 2)]
    assert found == [(2, False), (3, True), (4, True)]


@pytest.mark.parametrize("batch", [1, 7, 250])
def test_every_500_edits_there_is_one_grid_moment(batch: int) -> None:
    stream = PlainStream([Line(1 + i / 10_000) for i in range(1203)])
    at = [m.edits for m, _ in checkpoints(stream.all, batch) if "grid" in m.reasons]
    assert len(at) == 2
    assert all(0 <= edits - want < batch for edits, want in zip(at, (GRID, 2 * GRID)))


def test_full_panels_are_asked_at_full_moments_only() -> None:
    usual = {name for name, cls in PROBES.items() if cls.default}
    elsewhere = {"ladder", "benchmarks", "choices", "coming", "faces", "sub-questions", "instances"}
    for s in schedule(plain(35)).steps:
        probes = {a.probe for a in s.questions}
        if s.checkpoint.full:
            assert probes | elsewhere == usual
        else:
            assert probes - {"ladder"} == {"right_after"} | ({"retention"} if "power" in s.checkpoint.reasons else set())


def test_the_fixed_panel_is_the_same_every_time() -> None:
    planned = schedule(plain(35))
    panels = [
        [(a.plan.question.id, a.plan.incl_prob) for a in s.questions if a.probe == "general"] for s in planned.steps if s.checkpoint.full
    ]
    assert len(panels) == 4
    assert all(panel == panels[0] for panel in panels)
    assert Counter(round(p, 3) for _, p in panels[0]) == {round(10 / 14, 3): 30, 24 / 30: 24}


@pytest.mark.parametrize("budget", [6000, 4000])
def test_the_budget_is_kept_by_shrinking_panels(budget: int) -> None:
    stream = plain(500, per_year=50)
    free, tight = schedule(stream), schedule(stream, budget=budget)
    assert free.n_questions > budget >= tight.n_questions
    assert tight.scale < free.scale <= 1
    now = [sum(a.plan.panel == "immediate" for s in x.steps for a in s.questions) for x in (free, tight)]
    assert now[0] == now[1]


def test_a_budget_that_cannot_be_kept_leaves_small_panels() -> None:
    planned = schedule(plain(40), budget=1)
    asked = [a for a in planned.steps[-1].questions if a.probe == "retention"]
    assert planned.scale < 0.02
    assert len(asked) >= 2


def test_events_out_of_order_are_refused() -> None:
    stream = plain(5)
    with pytest.raises(BadEvent, match="seq must be its position"):
        build(stream, stream.all[1:], ScheduleConfig())


def test_rows_say_what_happens_and_why() -> None:
    planned = schedule(plain(8))
    rows = list(planned.rows())
    assert sum(r.action == "edit" for r in rows) == 8
    assert sum(r.action == "probe" for r in rows) == planned.n_questions
    assert {r.reason for r in rows if r.panel == "immediate"} == {"right_after"}
    assert {r.reason for r in rows if r.step == 8 and r.panel == "age_mixed"} == {"end"}
    assert {r.question_id for r in rows if r.question_id} == {q.question_id for q in planned.question_rows()}
    assert [r.superseded_step for r in planned.event_rows()] == [None, None, 4, None, None, None, 8, None]


def test_a_draw_belongs_to_its_ids_and_seed() -> None:
    assert draw(0, "a", "b") == draw(0, "a", "b")
    assert len({draw(0, "a", "b"), draw(1, "a", "b"), draw(0, "a|b"), draw(0, "b", "a")}) >= 3
    values = [draw(3, str(i)) for i in range(2000)]
    assert all(0 <= v < 1 for v in values)
    assert sum(values) / 2000 == pytest.approx(0.5, abs=0.03)


class Loud(Probe):
    """Asks the same general question at every moment."""

    name, summary, version = "loud", "one question", 3

    def ask(self, past: EditHistory, moment: object) -> list[Planned]:
        return [Planned(past.general[0], "loud")]


def test_probes_can_be_given_and_their_version_is_kept() -> None:
    stream = plain(6)
    planned = build(stream, stream.all, ScheduleConfig(), {"loud": Loud()})
    assert [[(a.probe, a.version) for a in s.questions] for s in planned.steps] == [[("loud", 3)]] * 6
    assert len(planned.unique_questions) == 1


def test_lines_make_the_streams_that_these_tests_think_of() -> None:
    assert [line.revises for line in lines(8)] == [None, None, None, 2, None, None, None, 6]
