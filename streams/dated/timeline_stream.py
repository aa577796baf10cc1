"""A stream over facts with real dates: the certain changes in their real order, and the questions about them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from streams.base import BadStream, Skipped, Stream, StreamConfig, TrainPool
from streams.dated.states import DatedChange, SourceData, Timeline, certain_changes
from streams.files.entry import CONTROL_SHARE, EntryQuestion, QuestionCollector, QuestionKey, Role, consistent, question_key
from streams.files.records import distinct, plain, reasons
from streams.transforms import share
from testbed.core.events import EditEvent, Question, Split, content_id


@dataclass(frozen=True)
class ChangingFact:
    """A fact that changes, with its changes and its part in the run."""

    timeline: Timeline
    changes: tuple[DatedChange, ...]
    role: Role

    @property
    def first(self) -> str:
        """What was so before the first change."""
        return self.changes[0].previous

    @property
    def place(self) -> QuestionKey:
        return question_key(self.timeline.image, self.timeline.prompt)


class DatedStream(Stream):
    """Real changes, old value to new, ordered by date. A subclass gives `read`.

    The first change of a fact is its `add`, each later one a `revise`. `seed` orders changes of the same date;
    the shares of kinds, `edits_per_year` and `drift` have no meaning here. 15 % of the facts, by a hash of
    their names, are never edited: what they were before their first change is what must stay.
    """

    time_axis = "dated"
    heeds = frozenset({"since"})

    def __init__(self, config: StreamConfig) -> None:
        super().__init__(config)
        if problems := config.problems():
            raise BadStream("; ".join(problems))
        data = self.read(config)
        self.skipped = list(data.skipped)
        self._digest = content_id(data.digests)
        self._total = data.total
        self._single = self._earlier = 0
        self._facts = list(self._changing(data))
        if not self._facts:
            what = f"none of {data.total:,} records makes a change{self._since}"
            raise BadStream(f"{self.name}: {what} ({reasons(self.skipped) or 'no records'}).")
        self._edited = {f.timeline.name: f for f in self._facts if f.role == "edit"}
        self._reserved = {f.place for f in self._facts if f.role != "probe"}
        self._controls = [f for f in self._facts if f.role == "probe"]

    @abstractmethod
    def read(self, config: StreamConfig) -> SourceData:
        """The facts under `config.data_root`. Raises `BadStream`."""

    def _changing(self, data: SourceData) -> Iterator[ChangingFact]:
        """Facts with at least one certain change; of two facts with one name or question the first stays."""
        seen: set[object] = set()
        for t in data.timelines:
            keys = {t.name, question_key(t.image, t.prompt)}
            if keys & seen:
                self.skipped.append(Skipped(t.name, "the same question stands earlier"))
                continue
            seen |= keys
            found = tuple(certain_changes(t, self.skipped))
            late = tuple(m for m in found if m.time >= self.config.since)
            if late:
                yield ChangingFact(t, late, _role(t.name))
            self._single += not found
            self._earlier += len(found) - len(late)

    @property
    def _since(self) -> str:
        return f" from {self.config.since} on" if self.config.since else ""

    @property
    def origin(self) -> str:
        changes = sum(len(f.changes) for f in self._facts)
        controls = len(self._facts) - len(self._edited)
        title = self.summary.split(":")[0]
        return f"{title}, {changes:,} dated changes{self._since} of {len(self._facts):,} facts, {controls:,} of these never edited"

    def data_hash(self) -> str:
        return self._digest

    def counts(self) -> dict[str, Any]:
        years: dict[str, int] = {}
        for e in self._events:
            years[str(e.year)] = years.get(str(e.year), 0) + 1
        return {
            "records": self._total,
            "facts_without_a_certain_change": self._single,
            "changes_before": self._earlier,
            "edits_by_year": years,
        }

    @cached_property
    def _events(self) -> list[EditEvent]:
        facts = self._edited.values()
        key = [(m.time, share("tie", self.config.seed, f.timeline.name), i, f) for f in facts for i, m in enumerate(f.changes)]
        out: list[EditEvent] = []
        newest: dict[str, str] = {}
        for seq, (_, _, i, fact) in enumerate(sorted(key, key=lambda k: k[:3])):
            event = _event(fact, i, seq, newest.get(fact.timeline.name))
            newest[fact.timeline.name] = event.id
            out.append(event)
        return out

    def events(self, n: int) -> list[EditEvent]:
        return self._events[: max(n, 0)]

    @cached_property
    def _moves(self) -> dict[str, DatedChange]:
        counted: dict[str, int] = {}
        out = {}
        for e in self._events:
            i = counted.get(e.source, 0)
            out[e.id], counted[e.source] = self._edited[e.source].changes[i], i + 1
        return out

    def questions(self, event: EditEvent) -> tuple[Question, ...]:
        fact, move = self._find(event)
        t = fact.timeline
        collector = QuestionCollector(event, event.target, t.relation, self._reserved)
        collector.add(EntryQuestion("edit", t.prompt, move.target, t.image, move.also))
        for prompt in t.held_out:
            collector.add_free(EntryQuestion("text_generality", prompt, move.target, t.image, move.also))
        if t.by_name:
            collector.add_free(EntryQuestion("portability", t.by_name, move.target, aliases=move.also))
        collector.add(EntryQuestion("stale", t.prompt, move.previous, t.image))
        for split, control in self._locality(collector, fact):
            collector.add_free(EntryQuestion(split, control.timeline.prompt, control.first, control.timeline.image))
        return tuple(collector.asked)

    def _locality(self, collector: QuestionCollector, fact: ChangingFact) -> Iterator[tuple[Split, ChangingFact]]:
        """One control each: the same relation of another subject; another relation; another relation of the same subject."""
        t = fact.timeline
        start = int(share("control of", t.name) * len(self._controls))
        order = islice((*self._controls[start:], *self._controls[:start]), 400)
        fits = [c for c in order if collector.tells_apart(c.first)]
        same = next((c for c in fits if c.timeline.relation == t.relation), None)
        other = next((c for c in fits if c.timeline.relation != t.relation and c.timeline.subject != t.subject), None)
        sibling = next((c for c in self._by_subject.get(t.subject, []) if collector.tells_apart(c.first)), None)
        found: list[tuple[Split, ChangingFact | None]] = [("locality_hard", same), ("locality_far", other), ("locality_sibling", sibling)]
        for split, control in found:
            if control is not None:
                yield split, control

    @cached_property
    def _by_subject(self) -> dict[str, list[ChangingFact]]:
        out: dict[str, list[ChangingFact]] = {}
        for c in self._controls:
            out.setdefault(c.timeline.subject, []).append(c)
        return out

    def general(self) -> tuple[Question, ...]:
        return tuple(_belief(c, c.timeline.prompt, c.timeline.relation) for c in self._controls)

    def paraphrases(self, event: EditEvent) -> tuple[str, ...]:
        fact, _ = self._find(event)
        t = fact.timeline
        return tuple(p for p in distinct(t.train, [t.prompt, *t.held_out, t.by_name or t.prompt]) if plain(p) not in self._asked)

    @cached_property
    def _asked(self) -> set[str]:
        """Every prompt that some probe may ask, bare."""
        return {plain(p) for f in self._facts for p in (*f.timeline.held_out, f.timeline.by_name or f.timeline.prompt)}

    def train_pool(self) -> TrainPool:
        return TrainPool(tuple(_belief(f, f.timeline.prompt, "train pool") for f in self._facts if f.role == "train"))

    def beliefs(self) -> Iterator[Question]:
        """Every fact as it was before its first change, in the edit's wording, the train wordings and by name."""
        return consistent(self._all_beliefs())

    def _all_beliefs(self) -> Iterator[Question]:
        for f in self._facts:
            for prompt in (f.timeline.prompt, *f.timeline.train):
                yield _belief(f, prompt, f.timeline.relation)
            if f.timeline.by_name:
                yield Question("general", f.timeline.by_name, f.first, topic=f.timeline.relation)

    def _find(self, event: EditEvent) -> tuple[ChangingFact, DatedChange]:
        if event.id not in self._moves:
            raise BadStream(f"event {event.id} ({event.source or 'no source'}) is not of this stream ({self.origin})")
        return self._edited[event.source], self._moves[event.id]


def _role(name: str) -> Role:
    u = share("dated control", name)
    return "edit" if u >= CONTROL_SHARE else ("probe" if u < CONTROL_SHARE / 2 else "train")


def _event(fact: ChangingFact, number: int, seq: int, revises: str | None) -> EditEvent:
    t, move = fact.timeline, fact.changes[number]
    return EditEvent(
        kind="add" if revises is None else "revise",
        time=move.time,
        seq=seq,
        prompt=t.prompt,
        target=move.target,
        image=t.image,
        previous=move.previous,
        subject=t.subject,
        relation=t.relation,
        revises=revises,
        source=t.name,
    )


def _belief(f: ChangingFact, prompt: str, topic: str) -> Question:
    return Question("general", prompt, f.first, image=f.timeline.image, topic=topic)
