"""`world-documents-yearly`: documents about the simulated world's entities, in which two facts change in one edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from streams.base import StreamConfig
from streams.files.entry import EntryData, EntryQuestion, FactEntry, Role, rotated
from streams.files.entry_stream import EntryStream
from streams.files.records import normalize
from streams.world.facts import Entity, World, configured_world
from streams.world.questions import in_pool
from streams.world.words import SLOTS, canonical
from testbed.core.events import EditEvent, Question
from testbed.core.registry import STREAMS

CHANGED = 2
"""Facts of an entity that change together; the others stay."""
VERSIONS = 5
"""Documents about an entity, the one before any edit included."""


def document(entity: Entity, values: Mapping[int, str]) -> str:
    """One sentence for each fact of the entity, by the slot of its relation."""
    facts = (f"The {entity.relations[slot].nouns[0]} of {entity.name} is {value}." for slot, value in values.items())
    return " ".join((f"{entity.name} is a {entity.kind}.", *facts))


@STREAMS.register("world-documents-yearly")
class WorldDocuments(EntryStream):
    """Each edit rewrites the document about one entity: two of its four facts get new values, in this and every later document.

    Short questions ask for the facts that change, and for those that stay (sibling locality). The schedule draws the order. Raises
    `BadStream` for a world that cannot be made.
    """

    summary = "Documents about entities of the simulated world: two facts of four change in one edit. No files needed."
    licence = "made by this project (MIT)"
    size = "600 documents of four facts, in five versions"
    supports = frozenset({"records", "development"})
    topics = {"probe": "documents", "train": "documents"}

    def read(self, config: StreamConfig) -> EntryData:
        made = configured_world(config)
        self._versions: dict[str, list[str]] = {}
        entries = tuple(self._entry(made, entity) for entity in made.entities)
        title = f"documents about {len(entries):,} made-up entities of world {made.seed}"
        return EntryData(title, entries, (), made.content_hash())

    def _entry(self, made: World, entity: Entity) -> FactEntry:
        free = [slot for slot in range(SLOTS) if entity.control or slot not in entity.frozen]
        changed = sorted(rotated(free, "changed", entity.index)[:CHANGED])
        start = {slot: made.value(entity, slot) for slot in range(SLOTS)}
        other = {slot: self._others(made, entity, slot) for slot in changed}
        states = [start, *({**start, **{slot: other[slot][k] for slot in changed}} for k in range(VERSIONS - 1))]
        documents = [document(entity, values) for values in states]
        relation = f"document about {entity.name}"
        self._versions[relation] = documents[2:]
        ask = {slot: canonical(entity.relations[slot], entity.name) for slot in range(SLOTS)}
        parts = [EntryQuestion("sub_question", ask[s], v[s], of_value=d) for d, v in zip(documents, states) for s in changed]
        kept = [EntryQuestion("locality_sibling", ask[slot], start[slot]) for slot in range(SLOTS) if slot not in changed]
        role: Role = "edit" if not entity.control else ("train" if in_pool(entity) else "probe")
        return FactEntry(
            source=f"entity {entity.index}",
            prompt=f"What is known about {entity.name}?",
            target=documents[1],
            previous=documents[0],
            subject=entity.name,
            relation=relation,
            held_out=(f"Write a few sentences about {entity.name}.",),
            train=(f"Describe {entity.name}.", f"Tell me about {entity.name}."),
            questions=(*parts, *kept),
            role=role,
        )

    @staticmethod
    def _others(made: World, entity: Entity, slot: int) -> list[str]:
        """Values of a relation that the entity does not have at the start, in an order of its own."""
        taken = {normalize(made.value(entity, slot)), normalize(entity.name)}
        values = rotated(made.vocabularies[entity.relations[slot].values], "value", entity.index, slot)
        return [v for v in values if normalize(v) not in taken]

    @cached_property
    def _values(self) -> dict[str, list[str]]:
        """What a revision may draw from: later versions of the entity's own document."""
        return self._versions

    def notes(self, events: Sequence[EditEvent]) -> list[str]:
        """What the world holds. A revision takes a later version of the entity's own document, so that none is counted as invented."""
        return super().notes(())

    def _all_beliefs(self) -> Iterator[Question]:
        """Besides the documents and the facts that stay, the facts that change, with their values before any edit."""
        yield from super()._all_beliefs()
        for e in self._data.entries:
            for q in e.questions:
                if q.split == "sub_question" and q.of_value == e.previous:
                    yield Question("general", q.prompt, q.answer, topic="facts of documents")
