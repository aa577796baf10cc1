"""The schedule: every edit and every question of a run, fixed and hashed before the run starts.

A step is one `apply` call. Probes ask after every step and, for the larger panels, after 1, 2, 4, 8, ... steps, every
500 edits, at the end of each year and at the end of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from streams.base import Stream
from testbed.core.events import EditEvent, Question, check_order, content_id
from testbed.core.registry import PROBES
from testbed.core.schema import EventRow, QuestionRow, ScheduleRow
from testbed.probes.base import Applied, Benchmark, Checkpoint, EditHistory, Planned, Probe, ProbeConfig

GRID = 500
"""Edits between the regular checkpoints at which every panel is asked."""


@dataclass(frozen=True)
class ScheduledQuestion:
    """A question of the schedule, and the name and version of the probe that asks it."""

    plan: Planned
    probe: str
    version: int


@dataclass(frozen=True)
class Step:
    """One `apply` call and the questions after it."""

    checkpoint: Checkpoint
    edits: tuple[Applied, ...]
    questions: tuple[ScheduledQuestion, ...]


@dataclass(frozen=True)
class Schedule:
    """All steps of a run, and the factor by which panels were shrunk to fit the budget (1.0: not at all)."""

    steps: tuple[Step, ...]
    scale: float = 1.0

    @property
    def n_questions(self) -> int:
        """Questions of one editor; a question that several checkpoints or panels ask counts each time."""
        return sum(len(s.questions) for s in self.steps)

    @cached_property
    def superseded(self) -> dict[str, int]:
        """Event id to the step at which a later event replaced it."""
        return {a.event.revises: a.step for s in self.steps for a in s.edits if a.event.revises}

    @cached_property
    def unique_questions(self) -> dict[str, Question]:
        """The questions by id, in the order of their first use."""
        return {q.plan.question.id: q.plan.question for s in self.steps for q in s.questions}

    @cached_property
    def hash(self) -> str:
        """Hash of all rows of schedule.parquet (16 hex digits)."""
        return content_id([[r.step, r.action, r.edit_id, r.question_id, r.probe, r.panel, round(r.incl_prob, 9)] for r in self.rows()])

    def rows(self) -> Iterator[ScheduleRow]:
        """The rows of schedule.parquet."""
        for s in self.steps:
            for a in s.edits:
                yield ScheduleRow(s.checkpoint.step, "edit", a.event.id, None, "", "", 1.0, "edit")
            for q in s.questions:
                edit = q.plan.edit.event.id if q.plan.edit else None
                why = "right_after" if q.plan.panel == "immediate" else s.checkpoint.why
                yield ScheduleRow(s.checkpoint.step, "probe", edit, q.plan.question.id, q.probe, q.plan.panel, q.plan.incl_prob, why)

    def event_rows(self) -> Iterator[EventRow]:
        """The rows of events.parquet."""
        for s in self.steps:
            for a in s.edits:
                e = a.event
                image = e.image.key if e.image is not None else None
                names = (e.prompt, e.target, image, e.previous, e.subject, e.relation, e.revises)
                yield EventRow(e.id, e.kind, a.step, e.time, e.seq, *names, self.superseded.get(e.id), e.source)

    def question_rows(self) -> Iterator[QuestionRow]:
        """The rows of questions.parquet."""
        for q in self.unique_questions.values():
            image = q.image.key if q.image is not None else None
            yield QuestionRow(q.id, q.event_id, q.split, q.prompt, image, q.answer, list(q.aliases), q.topic, list(q.choices), q.scoring)


@dataclass(frozen=True)
class ScheduleConfig:
    """Everything but the events that a schedule depends on."""

    batch: int = 1
    """Edits per step."""
    seed: int = 0
    """Seed of the panels."""
    budget: int = 8000
    """Questions of one editor per 500 edits."""
    benchmarks: tuple[Benchmark, ...] = ()
    asked: ProbeConfig = field(default_factory=ProbeConfig)
    """What is asked."""


def build(stream: Stream, events: Sequence[EditEvent], config: ScheduleConfig, probes: dict[str, Probe] | None = None) -> Schedule:
    """The schedule of a run; panels shrink until the questions fit `config.budget`.

    The questions right after each edit are never thinned, and no panel falls below two, so a run overruns a very small budget;
    `Schedule.scale`, a note and the dry run show it. Raises `BadEvent` when the events are out of order.
    """
    check_order(list(events))
    probes = probes if probes is not None else {n: cls() for n, cls in PROBES.items() if cls.default or n in config.asked.also}
    questions = {e.id: stream.questions(e) for e in events}
    joint = any(q.needs for asked in questions.values() for q in asked)
    past = EditHistory((), (), lambda e: questions[e.id], stream.general(), config.seed, benchmarks=config.benchmarks)
    past = replace(past, asked=config.asked)
    allowed = config.budget * max(1.0, len(events) / GRID)
    scale = 1.0
    for _ in range(8):
        schedule = _build(replace(past, scale=scale), events, config, probes, joint)
        if schedule.n_questions <= allowed or scale < 0.02:
            break
        fixed = sum(q.plan.panel == "immediate" for s in schedule.steps for q in s.questions)
        panels = schedule.n_questions - fixed
        scale *= min(0.95, max(0.05, (allowed - fixed) / max(1, panels)))
    return schedule


def _build(past: EditHistory, events: Sequence[EditEvent], config: ScheduleConfig, probes: dict[str, Probe], joint: bool) -> Schedule:
    """All steps; with `joint` some questions are asked only while several edits are live."""
    steps: list[Step] = []
    live: dict[str, Applied] = {}
    planned = list(checkpoints(events, config.batch))
    every = tuple(a for _, edits in planned for a in edits)
    for checkpoint, edits in planned:
        for a in edits:
            if a.event.revises:
                live.pop(a.event.revises, None)
            live[a.event.id] = a
        alive = tuple(a for a in edits if a.event.id in live)
        now = replace(past, new=alive, live=tuple(live.values()), coming=every[checkpoint.edits :])
        if "end" in checkpoint.reasons:
            now = replace(now, scale=min(1.0, past.scale * config.asked.end))
        if joint:
            now = replace(now, questions=lambda e, live=live: [q for q in past.questions(e) if live.keys() >= set(q.needs)])
        questions = [ScheduledQuestion(plan, name, p.version) for name, p in sorted(probes.items()) for plan in p.ask(now, checkpoint)]
        steps.append(Step(checkpoint, edits, tuple(questions)))
    return Schedule(tuple(steps), past.scale)


def checkpoints(events: Sequence[EditEvent], batch: int) -> Iterator[tuple[Checkpoint, tuple[Applied, ...]]]:
    """The checkpoint after each step, with the edits of the step: `batch` of them, fewer at the end of a year, because no
    step spans two years."""
    step, start = 0, 0
    while start < len(events):
        end = start + 1
        while end < len(events) and end - start < batch and events[end].year == events[start].year:
            end += 1
        step += 1
        edits = tuple(Applied(e, step, start + i + 1) for i, e in enumerate(events[start:end]))
        yield Checkpoint(step, end, events[end - 1].time, _reasons(events, step, start, end), start), edits
        start = end


def _reasons(events: Sequence[EditEvent], step: int, start: int, end: int) -> frozenset[str]:
    """The reasons to ask after the step that makes the edits from `start` up to `end`."""
    last_of_year = end == len(events) or events[end].year != events[start].year
    found = {"power": step & (step - 1) == 0, "grid": end // GRID > start // GRID, "end": end == len(events), "year": last_of_year}
    return frozenset({"right_after", *(reason for reason, holds in found.items() if holds)})
