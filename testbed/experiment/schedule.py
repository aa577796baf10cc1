"""The explicit list of what will happen: every edit and every question of a run, fixed and hashed beforehand.

A step is one `apply` call. Probes come right after every step and, for the larger panels, after 1, 2, 4, 8,
... steps, at every 500 edits, at each year's end and at the end of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from streams.base import Stream
from testbed.core.events import EditEvent, Question, check_order, content_id
from testbed.core.registry import PROBES
from testbed.core.schema import EventRow, QuestionRow, ScheduleRow
from testbed.probes.base import Applied, Benchmark, Moment, Past, Planned, Probe

GRID = 500


@dataclass(frozen=True)
class Asked:
    """A planned question and the probe that asks it."""

    plan: Planned
    probe: str
    version: int


@dataclass(frozen=True)
class Step:
    """One `apply` call and the questions after it."""

    moment: Moment
    edits: tuple[Applied, ...]
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class Schedule:
    """All steps of a run, and how far panels were shrunk to fit the budget (1.0: not at all)."""

    steps: tuple[Step, ...]
    scale: float = 1.0

    @property
    def n_questions(self) -> int:
        return sum(len(s.asked) for s in self.steps)

    @cached_property
    def superseded(self) -> dict[str, int]:
        """Event id to the step at which a later event replaced it."""
        return {a.event.revises: a.step for s in self.steps for a in s.edits if a.event.revises}

    @cached_property
    def unique_questions(self) -> dict[str, Question]:
        """Every question that is asked at least once, by id, in order of first use."""
        return {a.plan.question.id: a.plan.question for s in self.steps for a in s.asked}

    @cached_property
    def hash(self) -> str:
        return content_id([[r.step, r.action, r.edit_id, r.question_id, r.probe, r.panel, round(r.incl_prob, 9)] for r in self.rows()])

    def rows(self) -> Iterator[ScheduleRow]:
        """schedule.parquet."""
        for s in self.steps:
            for a in s.edits:
                yield ScheduleRow(s.moment.step, "edit", a.event.id, None, "", "", 1.0, "edit")
            for q in s.asked:
                edit = q.plan.edit.event.id if q.plan.edit else None
                why = "right_after" if q.plan.panel == "immediate" else s.moment.why
                yield ScheduleRow(s.moment.step, "probe", edit, q.plan.question.id, q.probe, q.plan.panel, q.plan.incl_prob, why)

    def event_rows(self) -> Iterator[EventRow]:
        """events.parquet."""
        for s in self.steps:
            for a in s.edits:
                e = a.event
                image = e.image.key if e.image is not None else None
                names = (e.prompt, e.target, image, e.previous, e.subject, e.relation, e.revises)
                yield EventRow(e.id, e.kind, a.step, e.time, e.seq, *names, self.superseded.get(e.id), e.source)

    def question_rows(self) -> Iterator[QuestionRow]:
        """questions.parquet."""
        for q in self.unique_questions.values():
            image = q.image.key if q.image is not None else None
            yield QuestionRow(q.id, q.event_id, q.split, q.prompt, image, q.answer, list(q.aliases), q.topic, list(q.choices), q.scoring)


@dataclass(frozen=True)
class Plan:
    """What a schedule depends on besides the events: edits a step, panel seed, questions allowed per 500 edits, benchmarks."""

    batch: int = 1
    seed: int = 0
    budget: int = 8000
    benchmarks: tuple[Benchmark, ...] = ()


def build(stream: Stream, events: Sequence[EditEvent], plan: Plan, probes: dict[str, Probe] | None = None) -> Schedule:
    """The schedule of a run; panels are shrunk until at most `plan.budget` questions are asked per 500 edits.

    The questions asked right after each edit are never thinned, and a panel never falls under eight edits,
    so a very small budget is overrun; `Schedule.scale` and the dry run tell.
    Raises `BadEvent` when the events are out of order.
    """
    check_order(list(events))
    probes = probes if probes is not None else {name: cls() for name, cls in PROBES.items()}
    past = Past((), (), _remember(stream), stream.general(), plan.seed, benchmarks=plan.benchmarks)
    allowed = plan.budget * max(1.0, len(events) / GRID)
    scale = 1.0
    for _ in range(6):
        schedule = _build(replace(past, scale=scale), events, plan.batch, probes)
        if schedule.n_questions <= allowed or scale < 0.02:
            break
        fixed = sum(a.plan.panel == "immediate" for s in schedule.steps for a in s.asked)
        panels = schedule.n_questions - fixed
        scale *= min(0.95, max(0.05, (allowed - fixed) / max(1, panels)))
    return schedule


def _remember(stream: Stream) -> Callable[[EditEvent], Sequence[Question]]:
    """The stream's questions of an event, made once."""
    made: dict[str, tuple[Question, ...]] = {}

    def questions(event: EditEvent) -> tuple[Question, ...]:
        if event.id not in made:
            made[event.id] = stream.questions(event)
        return made[event.id]

    return questions


def _build(past: Past, events: Sequence[EditEvent], batch: int, probes: dict[str, Probe]) -> Schedule:
    steps = []
    live: dict[str, Applied] = {}
    planned = list(moments(events, batch))
    every = tuple(a for _, edits in planned for a in edits)
    for moment, edits in planned:
        for a in edits:
            if a.event.revises:
                live.pop(a.event.revises, None)
            live[a.event.id] = a
        alive = tuple(a for a in edits if a.event.id in live)
        now = replace(past, new=alive, live=tuple(live.values()), coming=every[moment.edits :])
        asked = [Asked(plan, name, p.version) for name, p in sorted(probes.items()) for plan in p.ask(now, moment)]
        steps.append(Step(moment, edits, tuple(asked)))
    return Schedule(tuple(steps), past.scale)


def moments(events: Sequence[EditEvent], batch: int) -> Iterator[tuple[Moment, tuple[Applied, ...]]]:
    """Steps of `batch` edits (fewer at a year's end, so that no step spans two years), with the reasons to probe."""
    step, at = 0, 0
    while at < len(events):
        end = at + 1
        while end < len(events) and end - at < batch and events[end].year == events[at].year:
            end += 1
        step += 1
        edits = tuple(Applied(e, step, at + i + 1) for i, e in enumerate(events[at:end]))
        yield Moment(step, end, events[end - 1].time, _reasons(events, step, at, end), at), edits
        at = end


def _reasons(events: Sequence[EditEvent], step: int, at: int, end: int) -> frozenset[str]:
    reasons = {"right_after"}
    if step & (step - 1) == 0:
        reasons.add("power")
    if end // GRID > at // GRID:
        reasons.add("grid")
    if end == len(events):
        reasons |= {"end", "year"}
    elif events[end].year != events[at].year:
        reasons.add("year")
    return frozenset(reasons)
