"""The stream that every source of records stands on.

A loader reads its files into `FactEntry`s, and `EntryStream` does the rest, the same for every source: 15 % of the
records are never edited (half are asked as controls, half make the train pool), and the others are edited in the order
of their dates or, without dates, on a schedule that `transforms` draws. A source that differs in one step overrides it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

from streams import transforms
from streams.base import Stream, StreamConfig, TrainEdit, TrainPool
from streams.files.broken import BrokenPictures
from streams.files.entry import (
    DatedChange,
    EntryData,
    EntryQuestion,
    FactEntry,
    QuestionCollector,
    consistent,
    for_development,
    rotated,
    sample,
    with_true_targets,
)
from streams.files.records import distinct, normalize
from streams.files.train_edits import train_edits
from testbed.core.events import EditEvent, Question, Split


class EntryStream(Stream):
    """A stream over entries, dated where they have `changes`, else scheduled; a subclass gives `read`.

    Of dated entries the first change is an `add` and each later one a `revise`; `seed` orders changes of the same date; the
    shares of kinds, `edits_per_year` and `drift` have no effect. Raises `BadStream` where the files, or the configuration, cannot be used.
    """

    time_axis = "scheduled"
    supports = frozenset({"records", "development", "wrong"})
    far_controls: ClassVar[bool] = True
    """Ask a control of another category as `locality_far`, where the record brings no such question itself."""
    purpose: ClassVar[str] = ""
    """Prefix of the names of this source's random generators."""
    compares: ClassVar[bool] = False
    """Ask besides whether the new answer is likelier than the old one, as papers score CounterFact (probe `choices`)."""
    true_targets: ClassVar[bool] = False
    """Whether the targets are true, so that stream.keep=wrong leaves them as they are."""
    invents: bool = True
    """Whether a scheduled fact may be revised to the value of another fact of its relation."""
    topics: ClassVar[Mapping[str, str]] = {}
    """Topics of controls and beliefs by role or split; by default a record's category, and a locality question's split."""

    def __init__(self, config: StreamConfig) -> None:
        super().__init__(config)
        self._data = sample(self.read(config), config.records)
        self._broken = BrokenPictures() if config.missing_images == "skip" else None
        if self._broken:
            self._data = self._broken.without(self._data)
        if config.development:
            self._data = for_development(self._data)
        self.time_axis = "dated" if self._data.changes else "scheduled"
        if config.keep == "wrong" and self.time_axis != "dated" and not self.true_targets:
            self._data = with_true_targets(self._data)
        self.skipped = list(self._data.skipped)
        self._edited = tuple(e for e in self._data.entries if e.role == "edit")
        self._by_source = {e.source: e for e in self._edited}
        self._reserved = {e.key for e in self._data.entries if e.role != "probe"}
        self._controls = tuple(e for e in self._data.entries if e.role == "probe" and e.previous and e.key not in self._reserved)

    @abstractmethod
    def read(self, config: StreamConfig) -> EntryData:
        """The records under `config.data_root`. Raises `BadStream`."""

    @property
    def origin(self) -> str:
        never = f"{len(self._data.entries) - len(self._edited):,} of them never edited"
        if not self._data.changes:
            return f"{self._data.origin}, {never}"
        facts, since = self._data.entries, f" from {self.config.since} on" if self.config.since else ""
        changes = sum(len(self._data.changes[e.source]) for e in facts)
        return f"{self._data.origin}, {changes:,} dated changes{since} of {len(facts):,} facts, {never.replace('them', 'these')}"

    def data_hash(self) -> str:
        return self._data.digest

    def counts(self) -> dict[str, Any]:
        found: dict[str, Any] = {"read": self._read_counts(), "passed_over": dict(self._data.notes)}
        if self._data.missing:
            found["missing_images"] = dict(self._data.missing)
        if self._broken:
            found["broken_images"] = dict(sorted(self._broken.problems.items()))
        if self._data.changes:
            found["edits_by_year"] = dict(Counter(str(event.year) for event, _ in self._dated.values()))
        return found

    def _read_counts(self) -> dict[str, int]:
        """How many facts have each optional part, and how many questions of each split they bring."""
        facts = self._data.entries
        found = {"facts": len(facts), "old answers": sum(e.previous is not None for e in facts)}
        found |= {"subjects": sum(e.subject is not None for e in facts), "pictures": sum(e.image is not None for e in facts)}
        found |= {"held-out paraphrases": sum(len(e.held_out) for e in facts), "train paraphrases": sum(len(e.train) for e in facts)}
        return found | Counter(q.split for e in facts for q in e.questions)

    def notes(self, events: Sequence[EditEvent]) -> list[str]:
        found = ", ".join(f"{n:,} {name}" for name, n in self._read_counts().items())
        out = [f"read: {found}", *(f"{n:,} x {note}" for note, n in sorted(self._data.notes.items()))]
        out += self._broken.notes() if self._broken else []
        if invented := sum(e.kind == "revise" for e in events) if self.time_axis == "scheduled" else 0:
            share = f"{invented:,} of {len(events):,} edits ({invented / len(events):.0%})"
            out.append(f"{share} are invented revisions, with values of other facts of the same relation (stream.revise)")
        return out

    def events(self, n: int) -> list[EditEvent]:
        if self._data.changes:
            return [event for event, _ in self._dated.values()][: max(n, 0)]
        return list(islice(transforms.scheduled(self._edited, self._values, self.config, self.purpose), max(n, 0)))

    @cached_property
    def _dated(self) -> dict[str, tuple[EditEvent, DatedChange]]:
        """Every dated event with its change, by the event's id, in order."""
        tie = {e.source: transforms.hash_fraction("tie", self.config.seed, e.source) for e in self._edited}
        pairs = [(e, i, c) for e in self._edited for i, c in enumerate(self._data.changes.get(e.source, ()))]
        pairs.sort(key=lambda p: (p[2].time, tie[p[0].source], p[1]))
        steps = (transforms.FactChange("revise" if i else "add", e, c.target, c.previous) for e, i, c in pairs)
        events = transforms.dated(steps, (c.time for _, _, c in pairs))
        return {event.id: (event, c) for event, (_, _, c) in zip(events, pairs)}

    def questions(self, event: EditEvent) -> tuple[Question, ...]:
        """See `Stream.questions`. After a retire the answer is the one before any edit, where it is known."""
        entry = self._entry_of(event)
        value = event.target if event.kind != "retire" else entry.previous
        collector, own = QuestionCollector(event, value, entry.relation, self._reserved), tuple(self.own_questions(entry))
        if value is not None:
            aliases = self.aliases_of(entry, event, value)
            collector.add(EntryQuestion("edit", entry.prompt, value, entry.image, aliases))
            for prompt in entry.held_out:
                collector.add_unreserved(EntryQuestion("text_generality", prompt, value, entry.image, aliases))
            for question in own:
                if not question.is_locality:
                    self._add_of_value(collector, entry, question, value, aliases)
        if event.previous is not None:
            stale = entry.aliases if event.previous == entry.previous else ()
            collector.add(EntryQuestion("stale", entry.prompt, event.previous, entry.image, stale))
        self._add_locality(collector, entry, [q for q in own if q.is_locality])
        if self.compares and value is not None and event.previous is not None:
            self._add_choices(collector, entry, value, event.previous)
        return collector.questions

    def _add_choices(self, collector: QuestionCollector, entry: FactEntry, value: str, previous: str) -> None:
        """Add the new answer against the old one for the edit and its paraphrases; for neighbours the true answer against the new one."""
        collector.add_choice("choice_edit", EntryQuestion("edit", entry.prompt, value, entry.image), value, previous)
        for prompt in entry.held_out:
            collector.add_choice("choice_generality", EntryQuestion("edit", prompt, value, entry.image), value, previous)
        for question in self.own_questions(entry):
            if question.split == "locality_hard" and question.answer and self.is_unaffected(collector, question):
                collector.add_choice("choice_locality", question, question.answer, value)

    def own_questions(self, entry: FactEntry) -> Iterable[EntryQuestion]:
        """The questions that the record brings with it and that can be asked."""
        return self.brought(entry) if self._broken is None else self._broken.whole(self.brought(entry))

    def brought(self, entry: FactEntry) -> Iterable[EntryQuestion]:
        """The questions that the record brings with it."""
        return entry.questions

    def aliases_of(self, entry: FactEntry, event: EditEvent, value: str) -> tuple[str, ...]:
        """Other answers that are right while the fact has this value."""
        if event.id in self._dated:
            return self._dated[event.id][1].aliases
        return entry.aliases if value == entry.previous else ()

    def _add_of_value(
        self, collector: QuestionCollector, entry: FactEntry, question: EntryQuestion, value: str, aliases: tuple[str, ...]
    ) -> None:
        """Add a question of generality or portability: an answer that is the record's target moves with the value.

        A question that follows from several edits is added where all of them will be made.
        """
        target = question.of_value or entry.target
        if question.needs:
            needs = [self._additions[name] for name in question.needs if name in self._additions]
            if value == target and len(needs) == len(question.needs):
                collector.add_unreserved(question, tuple(needs))
        elif question.answer is None:
            own = question.aliases if value == target else ()
            collector.add_unreserved(replace(question, answer=value, aliases=(*aliases, *own)))
        elif normalize(question.answer) == normalize(target) and not question.choices:
            collector.add_unreserved(replace(question, answer=value, aliases=question.aliases if value == target else ()))
        elif value == target:
            collector.add_unreserved(question)

    @cached_property
    def _additions(self) -> dict[str, str]:
        """The id of the first event of each edited entry, by the entry's name."""
        return {e.source: e.id for e in self.events(10**6) if e.kind == "add"}

    def _add_locality(self, collector: QuestionCollector, entry: FactEntry, own: list[EntryQuestion]) -> None:
        """Add the locality questions: those the record brings (`own`), and controls of the stream."""
        for question in own:
            if self.is_unaffected(collector, question):
                collector.add_unreserved(question)
        for other in (c for c in self._controls if c.image and entry.image and c.image.name == entry.image.name):
            if normalize(other.prompt) != normalize(entry.prompt) and collector.reveals_leak(other.previous):
                collector.add_unreserved(other.as_control("locality_sibling"))
        if self.far_controls and not any(q.split == "locality_far" for q in own):
            far = self._far(collector, entry)
            if far is not None:
                collector.add_unreserved(far.as_control("locality_far"))

    def add_controls(self, collector: QuestionCollector, entry: FactEntry, order: Sequence[FactEntry]) -> None:
        """Add one control each, the first in order whose answer tells a leak apart: of the same relation of another subject; of
        another relation; of another relation of the same subject."""
        fits = [c for c in order if collector.reveals_leak(c.previous)]
        same = next((c for c in fits if c.relation == entry.relation), None)
        other = next((c for c in fits if c.relation != entry.relation and c.subject != entry.subject), None)
        sibling = next((c for c in self._controls if c.subject == entry.subject and collector.reveals_leak(c.previous)), None)
        found: list[tuple[FactEntry | None, Split]] = [(same, "locality_hard"), (other, "locality_far"), (sibling, "locality_sibling")]
        for control, split in found:
            if control is not None:
                collector.add_unreserved(control.as_control(split))

    def is_unaffected(self, collector: QuestionCollector, question: EntryQuestion) -> bool:
        """Whether the answer to a locality question that the record brings must stay as it is after the edit."""
        return question.answer is None or collector.differs_from_value(question.answer)

    def _far(self, collector: QuestionCollector, entry: FactEntry) -> FactEntry | None:
        """A control of another category, else any other control, whose answer tells a leak apart."""
        order = rotated(self._controls, "far", entry.source)
        fits = [c for c in order[:200] if collector.reveals_leak(c.previous)]
        return next((c for c in fits if c.relation != entry.relation), fits[0] if fits else None)

    def general(self) -> tuple[Question, ...]:
        return tuple(e.as_belief(e.prompt, self._topic(e)) for e in self._controls)

    def _topic(self, entry: FactEntry) -> str:
        return self.topics.get(entry.role, entry.relation)

    def paraphrases(self, event: EditEvent) -> tuple[str, ...]:
        entry = self._entry_of(event)
        return tuple(p for p in distinct(entry.train, [event.prompt]) if normalize(p) not in self._probe_prompts)

    @cached_property
    def _probe_prompts(self) -> set[str]:
        """Every prompt that some probe may ask, after `normalize`: no train paraphrase equals one, whatever its record."""
        return {normalize(p) for e in self._data.entries for p in self.probe_prompts(e)}

    def probe_prompts(self, entry: FactEntry) -> tuple[str, ...]:
        """The prompts of one record that probes may ask, the edit's own left out."""
        own = (entry.prompt,) if entry.role == "probe" else ()
        return (*entry.held_out, *(q.prompt for q in entry.questions), *own)

    def examples(self) -> Mapping[str, tuple[tuple[str, str], ...]]:
        """The first two facts of each relation in the train pool."""
        out: dict[str, tuple[tuple[str, str], ...]] = {}
        for e in self._data.entries:
            if e.role == "train" and e.previous and e.image is None and len(out.get(e.relation, ())) < 2:
                out[e.relation] = (*out.get(e.relation, ()), (e.prompt, e.previous))
        return out

    def train_pool(self) -> TrainPool:
        general = {q.prompt for q in self.general()}
        pool = [e for e in self._data.entries if e.role == "train" and e.previous and e.prompt not in general]
        return TrainPool(tuple(e.as_belief(e.prompt, "train pool") for e in pool), find_edits=self._train_edits)

    def _train_edits(self) -> tuple[TrainEdit, ...]:
        return tuple(train_edits(self._data.entries, self.own_questions))

    def beliefs(self) -> Iterator[Question]:
        """Every prompt with its answer before any edit, and the locality questions with theirs.

        Where one question of one picture has two answers, neither is a belief. Reads every picture file.
        """
        return consistent(self._all_beliefs())

    def _all_beliefs(self) -> Iterator[Question]:
        for e in self._data.entries:
            if e.previous:
                for prompt in (e.prompt, *e.train):
                    yield e.as_belief(prompt, self._topic(e))
            for q in self.own_questions(e):
                if q.is_locality and q.answer:
                    yield Question("general", q.prompt, q.answer, image=q.image, aliases=q.aliases, topic=self.topics.get(q.split, q.split))
                elif q.split == "portability" and q.answer is None:
                    yield Question("general", q.prompt, e.previous, image=q.image, aliases=e.aliases, topic=self._topic(e))

    @cached_property
    def _values(self) -> dict[str, list[str]]:
        """What a revision may draw from: the targets of each relation, sorted; nothing where no relation is given."""
        pool: dict[str, dict[str, str]] = {}
        for e in self._data.entries if self.invents else ():
            pool.setdefault(e.relation, {}).setdefault(normalize(e.target), e.target)
        return {category: sorted(values.values()) for category, values in pool.items()}

    def _entry_of(self, event: EditEvent) -> FactEntry:
        entry = self._by_source.get(event.source)
        if entry is None or entry.prompt != event.prompt or (self._data.changes and event.id not in self._dated):
            raise self.foreign_event(event)
        return entry
