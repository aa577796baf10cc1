"""Records without dates as a scheduled stream.

A loader reads its files into `FactEntry`s; `EntryStream` does the rest, the same for every source: 15 % of the
records are never edited (half are asked as controls, half make the train pool), the others are put on a
drawn schedule by `transforms`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

from streams import transforms
from streams.base import BadStream, Stream, StreamConfig, TrainPool
from streams.files.entry import Data, EntryQuestion, FactEntry, QuestionCollector, consistent, sample
from streams.files.records import distinct, plain
from testbed.core.events import EditEvent, Question, Split


class EntryStream(Stream):
    """A scheduled stream over entries. A subclass gives `read`, and may turn `far_controls` off.

    Raises `BadStream` where the files, or the configuration, cannot be used.
    """

    time_axis = "scheduled"
    heeds = frozenset({"records"})
    far_controls = True
    """Ask a control of another category as `locality_far`, where the record brings no far question itself."""

    def __init__(self, config: StreamConfig) -> None:
        super().__init__(config)
        if problems := config.problems():
            raise BadStream("; ".join(problems))
        self._data = sample(self.read(config), config.records)
        self.skipped = list(self._data.skipped)
        self._edited = tuple(e for e in self._data.entries if e.role == "edit")
        self._by_name = {e.name: e for e in self._edited}
        self._reserved = {e.place for e in self._data.entries if e.role != "probe"}
        self._controls = tuple(e for e in self._data.entries if e.role == "probe" and e.previous and e.place not in self._reserved)
        self._siblings: dict[str, list[FactEntry]] = {}
        for e in self._controls:
            if e.image is not None:
                self._siblings.setdefault(e.image.name, []).append(e)

    @abstractmethod
    def read(self, config: StreamConfig) -> Data:
        """The records under `config.data_root`. Raises `BadStream`."""

    @property
    def origin(self) -> str:
        return f"{self._data.origin}, {len(self._data.entries) - len(self._edited):,} of them never edited"

    def data_hash(self) -> str:
        return self._data.digest

    def counts(self) -> dict[str, Any]:
        return {"missing_images": dict(self._data.missing)} if self._data.missing else {}

    def events(self, n: int) -> list[EditEvent]:
        facts = [_fact(e) for e in self._edited]
        return list(islice(transforms.scheduled(facts, self._values, self.config), max(n, 0)))

    def questions(self, event: EditEvent) -> tuple[Question, ...]:
        """See `Stream.questions`. After a retire the answer is the one before any edit, where it is known."""
        entry = self._entry_of(event)
        value = event.target if event.kind != "retire" else entry.previous
        collector = QuestionCollector(event, value, entry.category, self._reserved)
        if value is not None:
            also = entry.aliases if value == entry.previous else ()
            collector.add(EntryQuestion("edit", entry.prompt, value, entry.image, also))
            for prompt in entry.held_out:
                collector.add_free(EntryQuestion("text_generality", prompt, value, entry.image, also))
            for ask in entry.asks:
                self._ask_of_value(collector, entry, ask, value)
        if event.previous is not None:
            stale = entry.aliases if event.previous == entry.previous else ()
            collector.add(EntryQuestion("stale", entry.prompt, event.previous, entry.image, stale))
        self._ask_locality(collector, entry)
        return tuple(collector.asked)

    def _ask_of_value(self, collector: QuestionCollector, entry: FactEntry, ask: EntryQuestion, value: str) -> None:
        """Generality and portability: an answer that is the record's target moves with the value."""
        if ask.split.startswith("locality_"):
            return
        if ask.answer is None or plain(ask.answer) == plain(entry.target):
            collector.add_free(replace(ask, answer=value, aliases=ask.aliases if value == entry.target else ()))
        elif value == entry.target:
            collector.add_free(ask)

    def _ask_locality(self, collector: QuestionCollector, entry: FactEntry) -> None:
        own = [a for a in entry.asks if a.split.startswith("locality_")]
        for ask in own:
            if (ask.answer is None or collector.differs(ask.answer)) and not self.touches_edited(ask):
                collector.add_free(ask)
        for other in self._siblings.get(entry.image.name if entry.image else "", []):
            if plain(other.prompt) != plain(entry.prompt) and collector.tells_apart(other.previous or ""):
                collector.add_free(_control(other, "locality_sibling"))
        if self.far_controls and not any(a.split == "locality_far" for a in own):
            far = self._far(collector, entry)
            if far is not None:
                collector.add_free(_control(far, "locality_far"))

    def touches_edited(self, ask: EntryQuestion) -> bool:
        """Whether a locality question asks, in other words, for what some edit changes; such a one is not asked."""
        return False

    def _far(self, collector: QuestionCollector, entry: FactEntry) -> FactEntry | None:
        """A control of another category, else any other control, whose answer tells a leak apart."""
        start = int(transforms.share("far", entry.name) * len(self._controls))
        order = [*self._controls[start:], *self._controls[:start]]
        fits = [c for c in islice(order, 200) if collector.tells_apart(c.previous or "")]
        return next((c for c in fits if c.category != entry.category), fits[0] if fits else None)

    def general(self) -> tuple[Question, ...]:
        return tuple(_belief(e, e.prompt, e.category) for e in self._controls)

    def paraphrases(self, event: EditEvent) -> tuple[str, ...]:
        entry = self._entry_of(event)
        return tuple(p for p in distinct(entry.train, [event.prompt]) if plain(p) not in self._asked_prompts)

    @cached_property
    def _asked_prompts(self) -> set[str]:
        """Every prompt that some probe may ask, bare: no train paraphrase equals one, of whatever record."""
        entries = self._data.entries
        return {plain(p) for e in entries for p in (*e.held_out, *(a.prompt for a in e.asks), *([e.prompt] if e.role == "probe" else []))}

    def train_pool(self) -> TrainPool:
        asked = {q.prompt for q in self.general()}
        pool = [e for e in self._data.entries if e.role == "train" and e.previous and e.prompt not in asked]
        return TrainPool(tuple(_belief(e, e.prompt, "train pool") for e in pool))

    def beliefs(self) -> Iterator[Question]:
        """Every prompt with its answer before any edit, locality questions among them.

        Where one question of one picture has two answers, neither is a belief. Reads every picture file.
        """
        return consistent(self._all_beliefs())

    def _all_beliefs(self) -> Iterator[Question]:
        for e in self._data.entries:
            if e.previous:
                for prompt in (e.prompt, *e.train):
                    yield _belief(e, prompt, e.category)
            for a in e.asks:
                if a.split.startswith("locality_") and a.answer:
                    yield Question("general", a.prompt, a.answer, image=a.image, aliases=a.aliases, topic=a.split)

    @cached_property
    def _values(self) -> dict[str, list[str]]:
        """What a revision may draw from: the targets of each category, sorted."""
        pool: dict[str, dict[str, str]] = {}
        for e in self._data.entries:
            pool.setdefault(e.category, {}).setdefault(plain(e.target), e.target)
        return {category: sorted(values.values()) for category, values in pool.items()}

    def _entry_of(self, event: EditEvent) -> FactEntry:
        entry = self._by_name.get(event.source)
        if entry is None or entry.prompt != event.prompt:
            raise BadStream(f"event {event.id} ({event.source or 'no source'}) is not of this stream ({self.origin})")
        return entry


def _fact(e: FactEntry) -> transforms.EditableFact:
    return transforms.EditableFact(e.prompt, e.target, e.name, e.image, e.previous, e.subject, e.category, e.aliases)


def _control(e: FactEntry, split: Split) -> EntryQuestion:
    return EntryQuestion(split, e.prompt, e.previous, e.image, e.aliases)


def _belief(e: FactEntry, prompt: str, topic: str) -> Question:
    return Question("general", prompt, e.previous, image=e.image, aliases=e.aliases, topic=topic)
