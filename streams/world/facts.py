"""The simulated world at its start: entities, emblems, facts, and which of them no edit ever touches.

Entities come in families of five of one kind: a control, which is never edited, and four others. The
emblems of three of the four differ from the control's in exactly one part (hard locality with a truth that
no event changes); the fourth's is drawn freely. Of each of the four one relation is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from streams.base import BadStream, StreamConfig
from streams.world.emblem import Code, Photo, change_part, random_code
from streams.world.words import KINDS, RELATIONS, SLOTS, Relation, invent, vocabularies
from testbed.core.events import content_id

DEFAULT_SIZE = 600
FAMILY = 5
NEAR_DUPLICATES = 3
"""Entities of a family whose emblem differs from the control's in one part."""


@dataclass(frozen=True, slots=True)
class Entity:
    """An entity with its emblem. `index` is its number in the world; `frozen` holds the slots of relations never edited."""

    index: int
    kind: str
    name: str
    code: Code
    control: bool
    frozen: frozenset[int]

    @property
    def relations(self) -> tuple[Relation, ...]:
        return RELATIONS[self.kind]


@dataclass(frozen=True, slots=True)
class WorldFact:
    """A fact of the world at its start: the entity, the slot (0 to 3) of its relation, the value."""

    entity: Entity
    slot: int
    value: str

    @property
    def relation(self) -> Relation:
        return self.entity.relations[self.slot]

    @property
    def frozen(self) -> bool:
        return self.slot in self.entity.frozen


class World:
    """A world as a function of (seed, size). Raises ValueError for a size that families cannot make up.

    Args:
        seed: which world; names, emblems and facts all depend on it.
        size: number of entities, a multiple of 20 (four kinds, families of five), 20 to 10,000.
    """

    def __init__(self, seed: int = 0, size: int = DEFAULT_SIZE) -> None:
        step = FAMILY * len(KINDS)
        if size % step or not step <= size <= 10_000:
            raise ValueError(f"world_size must be a multiple of {step} from {step} to 10000, got {size}")
        if seed < 0:
            raise ValueError(f"world_seed must be 0 or more, got {seed}")
        self.seed, self.size = seed, size
        rng = np.random.default_rng([seed, size, 11])
        taken: set[str] = set()
        self.vocabularies: dict[str, tuple[str, ...]] = vocabularies(rng, taken)
        self.entities: tuple[Entity, ...] = tuple(self._make_entities(rng, taken))
        for kind in KINDS:
            self.vocabularies[kind] = tuple(e.name for e in self.entities if e.kind == kind)
        self.by_name = {e.name: e for e in self.entities}
        self._start = self._make_facts(rng)

    def _make_entities(self, rng: np.random.Generator, taken: set[str]) -> list[Entity]:
        used: set[Code] = set()
        out: list[Entity] = []
        for kind in KINDS:
            names = invent(kind, self.size // len(KINDS), rng, taken)
            for i, name in enumerate(names):
                base = out[-(i % FAMILY)].code if 0 < i % FAMILY <= NEAR_DUPLICATES else None
                code = _fresh_code(base, used, rng)
                control = i % FAMILY == 0
                frozen = frozenset(range(SLOTS)) if control else frozenset({int(rng.integers(SLOTS))})
                out.append(Entity(len(out), kind, name, code, control, frozen))
        return out

    def _make_facts(self, rng: np.random.Generator) -> dict[tuple[int, int], str]:
        facts = {}
        for e, slot in product(self.entities, range(SLOTS)):
            values = self.vocabularies[e.relations[slot].values]
            pick = values[int(rng.integers(len(values)))]
            facts[e.index, slot] = values[(values.index(pick) + 1) % len(values)] if pick == e.name else pick
        return facts

    def value(self, entity: Entity, slot: int) -> str:
        """What is true of the entity at the start."""
        return self._start[entity.index, slot]

    def fact(self, entity: Entity, slot: int) -> WorldFact:
        return WorldFact(entity, slot, self.value(entity, slot))

    def facts(self) -> list[WorldFact]:
        """Every fact, by entity and slot."""
        return [self.fact(e, s) for e in self.entities for s in range(SLOTS)]

    def near_duplicate(self, entity: Entity) -> Entity:
        """The control of the entity's family; for most entities its emblem differs in one part only."""
        return self.entities[entity.index - entity.index % FAMILY]

    def has_near_duplicate(self, entity: Entity) -> bool:
        """Whether the emblem differs in exactly one part from another entity's of the same kind."""
        return entity.index % FAMILY <= NEAR_DUPLICATES

    def controls(self, kind: str | None = None) -> list[Entity]:
        return [e for e in self.entities if e.control and kind in (None, e.kind)]

    def photo(self, entity: Entity, number: int) -> Photo:
        """Photo `number` of the entity; 0 is the one that edits show."""
        return Photo(entity.code, self.seed * 1000 + number)

    def content_hash(self) -> str:
        """Hash of all names, emblems and facts."""
        return content_id([(e.name, e.kind, e.code, sorted(e.frozen)) for e in self.entities], sorted(self._start.items()))


def _fresh_code(base: Code | None, used: set[Code], rng: np.random.Generator) -> Code:
    while True:
        code = random_code(rng) if base is None else change_part(base, rng)
        if code not in used:
            used.add(code)
            return code


@lru_cache(maxsize=4)
def world(seed: int, size: int) -> World:
    """The world, cached: no function changes a world."""
    return World(seed, size or DEFAULT_SIZE)


def configured_world(config: StreamConfig) -> World:
    """The world of a stream's configuration. Raises `BadStream` for a seed or a size of which none can be made."""
    try:
        return world(config.world_seed, config.world_size)
    except ValueError as e:
        raise BadStream(f"the simulated world cannot be made: {e}") from e


def stable_index(n: int, *parts: object) -> int:
    """A number in [0, n) that depends on the parts alone, on any machine."""
    return int(content_id(*parts), 16) % n
