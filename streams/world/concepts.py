"""`world-concepts-yearly`: definitions of made-up classes of the simulated world's entities, whose members follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from streams.base import StreamConfig
from streams.files.concepts import membership
from streams.files.entry import EntryData, EntryQuestion, FactEntry, rotated, with_roles
from streams.files.entry_stream import EntryStream
from streams.world.facts import Entity, World, configured_world, world
from streams.world.words import KINDS, RELATIONS, canonical, invent
from testbed.core.events import EditEvent, Question, Split
from testbed.core.registry import STREAMS

CONCEPTS = 60
"""Classes of each kind of entity."""
VERSIONS = 5
"""Definitions of a class, the one before any edit included."""
SLOT = 2
"""The relation that defines classes: currency, product, mascot, subject. No edit of this stream changes such a fact."""
ASKED = 2
"""Instances of each group (those that are always in, always out, in by the first definition, or in by a later one) that are asked."""


@dataclass(frozen=True)
class MadeUpClass:
    """A class of the world: its name, the kind of its members, and for each definition the values that make a member."""

    name: str
    kind: str
    versions: tuple[tuple[str, ...], ...]

    def definition(self, version: int) -> str:
        """The sentence that defines the class."""
        *first, last = self.versions[version]
        noun = RELATIONS[self.kind][SLOT].nouns[0]
        return f"A {self.name} is a {self.kind} whose {noun} is {', '.join(first)} or {last}."


def classes(made: World) -> list[MadeUpClass]:
    """60 classes of each kind. The first value of a class is the same in every definition; the other two are new in each."""
    taken = {e.name for e in made.entities}.union(*made.vocabularies.values())
    names = iter(invent("product", CONCEPTS * len(KINDS), np.random.default_rng([made.seed, made.size, 13]), taken))
    out: list[MadeUpClass] = []
    for kind in KINDS:
        held = {made.value(e, SLOT) for e in made.entities if e.kind == kind}
        for number in range(CONCEPTS):
            drawn = rotated(made.vocabularies[RELATIONS[kind][SLOT].values], "class", kind, number)
            base, *others = sorted(drawn, key=lambda value: value not in held)[: 1 + 2 * VERSIONS]
            versions = tuple((base, others[2 * k], others[2 * k + 1]) for k in range(VERSIONS))
            out.append(MadeUpClass(next(names), kind, versions))
    return out


@dataclass(frozen=True)
class EntryMaker:
    """Makes the entries of classes. holders: by kind and value of the defining relation, the entities that have it."""

    made: World
    holders: Mapping[tuple[str, str], Sequence[Entity]]

    def entry(self, c: MadeUpClass) -> FactEntry:
        return FactEntry(
            source=f"class {c.name}",
            prompt=f"What is a {c.name}?",
            target=c.definition(1),
            previous=c.definition(0),
            subject=c.name,
            relation=_relation(c),
            held_out=(f"Give the definition of {c.name}.",),
            train=(f"Define {c.name}.", f"The word {c.name} means"),
            questions=tuple(self._questions(c)),
        )

    def _some(self, c: MadeUpClass, values: Sequence[str]) -> list[Entity]:
        """Entities of the class's kind that have one of these values."""
        found = [e for value in values for e in self.holders.get((c.kind, value), ())]
        return list(rotated(found, "instance", c.name, values))[:ASKED]

    def _questions(self, c: MadeUpClass) -> Iterator[EntryQuestion]:
        """For each definition the instances that belong to it, those of the first one, and those of none; and facts of members."""
        ever = {value for version in c.versions for value in version}
        outside = sorted(value for kind, value in self.holders if kind == c.kind and value not in ever)
        always, never = self._some(c, c.versions[0][:1]), self._some(c, outside)
        own = [self._some(c, version[1:]) for version in c.versions]
        for k in range(VERSIONS):
            later = own[k] if k else [e for group in own[1:] for e in group]
            for e in (*always, *never, *own[0], *(e for e in later if e not in own[0])):
                now, before = (self.made.value(e, SLOT) in c.versions[n] for n in (k, 0))
                split: Split = "instance_follow" if now != before else "instance_stay"
                yield EntryQuestion(split, membership(e.name, c.name), "Yes" if now else "No", of_value=c.definition(k))
        for e in own[0]:
            yield EntryQuestion("locality_sibling", canonical(e.relations[SLOT], e.name), self.made.value(e, SLOT))


@lru_cache(maxsize=4)
def definitions(seed: int, size: int) -> tuple[FactEntry, ...]:
    """The entries of a world's classes, cached: nothing changes them."""
    made = world(seed, size)
    holders: dict[tuple[str, str], list[Entity]] = {}
    for e in made.entities:
        holders.setdefault((e.kind, made.value(e, SLOT)), []).append(e)
    maker = EntryMaker(made, holders)
    return with_roles(map(maker.entry, classes(made)), key=lambda e: e.subject)


@STREAMS.register("world-concepts-yearly")
class WorldConcepts(EntryStream):
    """Each edit gives a class another definition; the world's facts, which never change, then say which entities belong to it.

    Instances are asked with Yes or No: those whose membership differs from that before any edit (`instance_follow`), and those for
    which it is the same (`instance_stay`). The schedule draws the order. Raises `BadStream` for a world that cannot be made.
    """

    summary = "Definitions of made-up classes change, and instances follow or stay. No files needed."
    licence = "made by this project (MIT)"
    size = "240 classes in five definitions"
    supports = frozenset({"records", "development"})
    topics = {"probe": "concepts", "train": "concepts"}

    def read(self, config: StreamConfig) -> EntryData:
        made = configured_world(config)
        entries = definitions(made.seed, made.size)
        title = f"definitions of {len(entries):,} made-up classes in world {made.seed} ({made.size:,} entities)"
        return EntryData(title, entries, (), made.content_hash())

    @cached_property
    def _values(self) -> dict[str, list[str]]:
        """What a revision may draw from: later definitions of the same class."""
        made = configured_world(self.config)
        return {_relation(c): [c.definition(k) for k in range(2, VERSIONS)] for c in classes(made)}

    def notes(self, events: Sequence[EditEvent]) -> list[str]:
        """What the world holds. A revision takes a later definition of the same class, so that none is counted as invented."""
        return super().notes(())

    def _all_beliefs(self) -> Iterator[Question]:
        """Besides the definitions and the facts of members, which instances belong to each class before any edit."""
        yield from super()._all_beliefs()
        for e in self._data.entries:
            for q in e.questions:
                if q.split == "instance_stay" and q.of_value == e.previous:
                    yield Question("general", q.prompt, q.answer, topic="instances of concepts")


def _relation(c: MadeUpClass) -> str:
    return f"definition of {c.name}"
