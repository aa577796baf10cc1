# pyright: strict
"""The contract of a stream: edits in time order, the questions about them, and what an editor may train on.

A stream is a deterministic function of (data, `StreamConfig`, seed). The first k events do not depend on
how many are taken, so a longer run extends a shorter one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from testbed.core.events import Ask, EditEvent, Question, content_id
from testbed.core.ranges import Fraction, NonNegativeInt, PositiveInt, out_of_range

TimeAxis = Literal["dated", "scheduled", "simulated"]
MissingImages = Literal["skip-absent", "skip", "text", "caption"]
Keep = Literal["all", "believed", "wrong"]
Order = Literal["drawn", "hardest", "easiest", "subjects"]
BURSTS_RANGE = (0.01, 3.0)
"""Smallest and largest value of `bursts` other than 0."""


@dataclass(frozen=True)
class StreamConfig:
    """Everything a stream depends on besides its data."""

    data_root: Path | None = None
    """Folder of the official files; without it a stream that can uses the simulated world, and its `origin` says so."""
    seed: int = 0
    """Seed of the schedule (and of the simulated world's history)."""
    edits_per_year: PositiveInt = 50
    """How many edits make a year, where the source has no dates."""
    revise: Fraction = 0.15
    """Share of edits that change an already edited fact again, in scheduled streams."""
    revert: Fraction = 0.03
    """Share of edits that bring an edited fact back to an earlier value."""
    retire: Fraction = 0.02
    """Share of edits that withdraw an edited fact."""
    repeats: PositiveInt = 1
    """How many values each fact takes in a row when it is first edited (scheduled and simulated streams)."""
    bursts: float = 0.0
    """How uneven the years are: standard deviation of the edits of a year, divided by `edits_per_year`."""
    drift: bool = False
    """Let the mix of categories move over the years (scheduled and simulated streams)."""
    order: Order = "drawn"
    """Order of the facts among the edits that a run takes: as drawn (or dated), by the unedited model's loss on the
    target, or those of one subject together. It depends on how many edits are taken; see `streams.arrange`."""
    records: NonNegativeInt = 0
    """How many usable records of MMEdit, VLKEB, zsRE, CounterFact, KnowEdit, `jsonl:`, `csv:` or `hub:` are taken, drawn by a
    hash of their names, so the same ones under every seed: a small model can be taught only so many beliefs. 0 is all
    of them; other streams refuse a number."""
    since: NonNegativeInt = 0
    """First year of a dated stream: changes before it are no edits, and the model is taught their outcome instead.
    0 begins with the first change; streams without dates refuse a year."""
    keep: Keep = "all"
    """Which facts are edited: all, those whose old answer the model gives (believed), or those that it gets wrong (wrong). With
    `wrong` the edits install the true answers, and questions that hold for a counterfactual target alone are left out."""
    hallucinations_of: str = ""
    """Whose wrong answers are edited, of a source that holds those of several named models (HalluEditBench: a folder's name). Empty is
    the only one there; other streams refuse a name."""
    development: bool = False
    """Edit facts that the stream never edits otherwise, under any seed, and never asks about, for the choice of settings
    (`python -m testbed.tune`); streams without such facts refuse it."""
    missing_images: MissingImages = "skip-absent"
    """What to do with a record whose picture is absent: skip it, ask without a picture, or put its caption in the prompt. A broken
    picture ends the run; with `skip` its record is skipped too, for which every picture of the source is decoded once."""
    fields: tuple[str, ...] = ()
    """For `jsonl:`, `csv:` and `hub:`: the source's name of a field of ours, as OURS=THEIRS, separated by commas."""
    world_seed: int = 0
    """Which simulated world; the committed tiny model knows world 0."""
    world_size: int = 0
    """Number of entities of the simulated world; 0 is the size that the tiny model was trained on."""

    @property
    def absent_images(self) -> Literal["skip", "text", "caption"]:
        """What to do with a record whose picture is absent."""
        return "skip" if self.missing_images == "skip-absent" else self.missing_images

    def problems(self) -> list[str]:
        """Every mistake in the values, as sentences; empty when there is none."""
        out = [f"stream.{problem}" for problem in out_of_range(self)]
        if self.bursts and not BURSTS_RANGE[0] <= self.bursts <= BURSTS_RANGE[1]:
            out.append(f"stream.bursts must be 0 or lie in [{BURSTS_RANGE[0]}, {BURSTS_RANGE[1]}], got {self.bursts}")
        if self.revise + self.revert + self.retire >= 1:
            out.append("stream.revise + stream.revert + stream.retire must stay under 1")
        return out


@dataclass(frozen=True)
class Skipped:
    """A record that could not be used: its position in its file, and the reason (shown in the manifest and the summary)."""

    where: str
    reason: str


@dataclass(frozen=True)
class TrainEdit:
    """An edit for methods that learn to edit, such as MEND; no run makes it or asks about it.

    event: the edit, with the old answer where it is known. rephrasings: other prompts, and other pictures, of its question, which
        its target answers too. locality: questions whose answers it must leave as they are.
    """

    event: EditEvent
    rephrasings: tuple[Ask, ...] = ()
    locality: tuple[Question, ...] = ()

    def asks(self) -> tuple[Ask, ...]:
        """Every prompt with its picture, the edit's first."""
        return (self.event.ask(), *self.rephrasings, *(q.ask() for q in self.locality))


@dataclass(frozen=True)
class TrainPool:
    """What editors may learn from before and during a run; no probe asks a question of it.

    questions: questions about unedited facts with the answers that the base model should give, for editors that sample
        what must stay; texts: running text, for estimates of second moments; find_edits: gives `edits`, which cost a pass over
        all records, so that they are looked for only where a method asks for them.
    """

    questions: tuple[Question, ...] = ()
    texts: tuple[str, ...] = ()
    find_edits: Callable[[], tuple[TrainEdit, ...]] = tuple

    @cached_property
    def edits(self) -> tuple[TrainEdit, ...]:
        """Edits of entities and pictures that no edit and no question of the stream is about (their answers may be the same)."""
        return self.find_edits()

    def apart_from(
        self, events: Sequence[EditEvent], questions: Iterable[Question], say: Callable[[str], None] = lambda line: None
    ) -> TrainPool:
        """The pool, whose edits are compared with those of a run, and with its questions, when a method first asks for them.

        Then `say` gets a line with the number of answers that both share, and `BadStream` is raised where a train edit is about a
        subject, a picture or a question of the run.
        """

        def find() -> tuple[TrainEdit, ...]:
            edits = self.edits
            if touching := touches(edits, events, questions):
                raise BadStream(
                    f"{len(touching)} of {len(edits)} train edits touch the stream, so that a method would learn what it is asked: "
                    f"{'; '.join(touching[:3])}. Take these records out of the train part of the source"
                )
            if edits:
                say(shared_answers(edits, events))
            return edits

        return replace(self, find_edits=find)


def question_key(item: EditEvent | Question | Ask) -> tuple[str, str]:
    """The key of the picture ("" for none), and the prompt."""
    return "" if item.image is None else item.image.key, item.prompt


def touches(edits: Sequence[TrainEdit], events: Sequence[EditEvent], questions: Iterable[Question]) -> list[str]:
    """A sentence for each train edit that is about a subject, a picture or a question of these events and questions."""
    used: list[EditEvent | Question] = [*events, *questions]
    subjects = {e.subject for e in events if e.subject}
    pictures = {x.image.key for x in used if x.image is not None}
    asked = {question_key(x) for x in used}
    out: list[str] = []
    for edit in edits:
        prompt, asks = edit.event.prompt, edit.asks()
        shown = next((a.image.key for a in asks if a.image is not None and a.image.key in pictures), None)
        again = next((a.prompt for a in asks if question_key(a) in asked), None)
        if edit.event.subject in subjects:
            out.append(f"{prompt!r} is of {edit.event.subject!r}, which the stream edits")
        elif shown is not None:
            out.append(f"{prompt!r} shows the picture {shown}, which is edited or asked about")
        elif again is not None:
            out.append(f"{prompt!r} has the question {again!r}, which is edited or asked")
    return out


def shared_answers(edits: Sequence[TrainEdit], events: Sequence[EditEvent]) -> str:
    """A line on how many answers of the stream's edits are answers of train edits too."""
    targets, known = {e.target for e in events if e.kind != "retire"}, {e.event.target for e in edits}
    return (
        f"{len(edits):,} train edits share no subject, picture or question with the stream; "
        f"{len(targets & known):,} of its {len(targets):,} different answers are answers of theirs too"
    )


class BadStream(ValueError):
    """A data root, file or field that cannot be used: what, where, what was expected, what to do."""


class Stream(ABC):
    """Base class of every stream. A subclass is registered with `STREAMS.register(name)`.

    Raises `BadStream` where the configuration cannot be used.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for --list."""
    time_axis: TimeAxis
    """A class attribute; a stream that reads either files or the simulated world sets it again on the instance."""
    licence: ClassVar[str]
    size: ClassVar[str]
    """How much the published source holds, for --list; `origin` says how much of it a run could use."""

    supports: frozenset[str] = frozenset()
    """Which of the settings `records`, `since`, `development` and `hallucinations_of`, and whether keep=`wrong`, this stream
    understands; it refuses the others."""

    def __init__(self, config: StreamConfig) -> None:
        self.config = config
        self.skipped: list[Skipped] = []
        for name in sorted({"records", "since", "development", "hallucinations_of"} - self.supports):
            if getattr(config, name):
                raise BadStream(f"this stream does not support stream.{name}: leave it out, or choose another stream (docs/schedules.md)")
        if config.keep == "wrong" and "wrong" not in self.supports:
            raise BadStream("stream.keep=wrong needs true answers to install, which this stream does not have: use all or believed")
        if problems := config.problems():
            raise BadStream("; ".join(problems))

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where the facts come from, for the manifest: "simulated world 0 (1,000 entities)", "OKEDIT files ..."."""

    @abstractmethod
    def events(self, n: int) -> list[EditEvent]:
        """The first n edits (fewer where the source ends), satisfying `testbed.core.events.check_order`."""

    @abstractmethod
    def questions(self, event: EditEvent) -> tuple[Question, ...]:
        """All held-out questions about one edit, `edit` split included; every id belongs to `event.id`.

        The right answers hold as long as the event is live, i.e. no later event revises it. Locality
        questions ask for facts that no event of the stream ever changes.
        """

    @abstractmethod
    def general(self) -> tuple[Question, ...]:
        """Questions of splits `general` and `text` that no edit should touch, with `topic` set."""

    def paraphrases(self, event: EditEvent) -> tuple[str, ...]:
        """Rephrased prompts of one edit from the train pool; disjoint from every prompt in `questions`."""
        return ()

    def examples(self) -> Mapping[str, tuple[tuple[str, str], ...]]:
        """By relation, prompts with their true answers about facts that are neither edited nor asked, to stand in front of a
        prompt of the relation. Empty by default."""
        return {}

    def train_pool(self) -> TrainPool:
        """What editors may learn from. Empty by default."""
        return TrainPool()

    def beliefs(self) -> Iterator[Question]:
        """What a model must believe before the first edit, for `testbed.pretrain`. Empty by default."""
        return iter(())

    def notes(self, events: Sequence[EditEvent]) -> list[str]:
        """What was read, passed over or invented for these events, a line each; shown to the user and kept in the manifest."""
        return []

    def data_hash(self) -> str:
        """Hash of the source's content (not of the schedule)."""
        return content_id(self.origin)

    def stream_hash(self, events: list[EditEvent]) -> str:
        """Hash of the events as they will be applied; the same on any machine."""
        return content_id([(e.id, e.time, e.seq) for e in events])

    def foreign_event(self, event: EditEvent) -> BadStream:
        """The error for an event that another stream made."""
        return BadStream(f"event {event.id} ({event.source or 'no source'}) is not of this stream ({self.origin})")

    def manifest(self) -> dict[str, Any]:
        """What the run's manifest says about the stream."""
        return {
            "name": self.name,
            "origin": self.origin,
            "time_axis": self.time_axis,
            "licence": self.licence,
            "data_hash": self.data_hash(),
            "skipped": len(self.skipped),
            "skipped_by_reason": dict(Counter(s.reason for s in self.skipped)),
            "skipped_records": [f"{s.where}: {s.reason}" for s in self.skipped],
            **self.counts(),
        }

    def counts(self) -> dict[str, Any]:
        """What else the manifest should count, by name."""
        return {}
