"""What the tiny model is taught about the simulated world: which questions, in what mix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import numpy as np

from streams.world.emblem import PARTS, photograph, random_code
from streams.world.facts import Entity, World
from streams.world.general import two_hops
from streams.world.skills import arithmetic, caption, comparison, grammar, perception, running_text, text_orders
from streams.world.words import (
    CAPTION_PROMPT,
    CAPTION_TRAIN,
    KINDS,
    NAMING_PROMPT,
    NAMING_TRAIN,
    RELATIONS,
    SLOTS,
    Relation,
    canonical,
    phrasings,
    picture_ref,
)
from testbed.editors.retrieval import prompts
from testbed.pretraining.packing import Example

T = TypeVar("T")
Point = tuple[Relation, str]
"""What a question or a stated fact is about: a relation, and how the entity is referred to."""
CANONICAL = 0.35
TEXT_MIX = {"fact": 0.76, "sum": 0.08, "compare": 0.04, "grammar": 0.06, "hop": 0.04, "text": 0.02}


@dataclass(frozen=True, slots=True)
class Pace:
    """What enters and leaves between which shares of the schedule."""

    facts: tuple[float, float] = (0.02, 0.06)
    """Facts by picture enter."""
    easy: tuple[float, float] = (0.06, 0.3)
    """Ever fewer rows of stated facts are easy: one or two facts, each asked for in its own words and nothing else."""
    entity_photos: float = 0.92
    """Share of photos that show entities; the others show random emblems."""
    counts: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    """How often one, two, three and four facts are stated."""
    near: tuple[float, float] = (0.4, 0.3)
    """Shares of stated facts about the same entity, and of the same relation of another one."""
    mix: Mapping[str, float] = field(default_factory=lambda: TEXT_MIX)
    """Shares of the questions without a picture."""
    by_number: bool = False
    """The fact that bears is named by its number, else by its target."""


class Curriculum:
    """Draws training examples about a world.

    Args:
        world: what is true.
        rng: every draw comes from it.
        pace: when things enter; `progress` is set by whoever trains.
    """

    def __init__(self, world: World, rng: np.random.Generator, pace: Pace = Pace()) -> None:
        self.world, self.rng, self.pace = world, rng, pace
        self._hops = two_hops(world, held_out=False)
        self._makers: dict[str, Callable[[], Example]] = {
            "fact": self._fact_by_name,
            "sum": lambda: Example(*arithmetic(rng, held_out=False)),
            "compare": lambda: Example(*comparison(rng, held_out=False)),
            "grammar": lambda: Example(*grammar(rng, held_out=False)),
            "hop": lambda: Example(*self._hops[self._below(len(self._hops))]),
            "text": self._text,
        }
        self._order: list[int] = []
        self.progress = 0.0

    def _easy(self) -> bool:
        """Whether the next row of stated facts is an easy one."""
        low, high = self.pace.easy
        return self.rng.random() > (self.progress - low) / (high - low)

    def context(self, by_picture: bool) -> tuple[np.ndarray | None, str, list[Example]]:
        """Stated facts and questions that they do or do not answer: (photo, shared beginning, how prompts go on)."""
        entity, easy = self._next_entity() if by_picture else self._entity(), self._easy()
        near = points_by_picture(entity, self.rng) if by_picture else points_by_name(self.world, entity, self.rng, self.pace.near)
        count = 1 + (self._below(2) if easy else int(self.rng.choice(4, p=self.pace.counts)))
        stated = state(self.world, near, count, self.rng)
        own = [(r, picture_ref(entity.kind) if by_picture else entity.name) for r in entity.relations]
        asked = own if by_picture else [*dict.fromkeys([*stated.about, *own])]
        if easy and (bearing := [p for p in asked if p in stated.about]):
            asked = bearing
        out, shared = [], prompts.in_context(stated.facts, "").removesuffix(CONTEXT_TAIL)
        for point in asked:
            learned = self._learned(point, entity)
            answer, name = stated.answer(point, learned, self.pace.by_number)
            wording = canonical(*point) if easy else self._ask(*point)
            out.append(Example(prompts.in_context(stated.facts, wording).removeprefix(shared), answer))
            if point in stated.about or self._below(3) == 0:
                out.append(Example(prompts.which_fact(stated.facts, wording).removeprefix(shared), name))
        order = self.rng.permutation(len(out))
        photo = photograph(entity.code, self.rng) if by_picture else None
        return photo, shared, [out[int(i)] for i in order]

    def _learned(self, point: Point, pictured: Entity) -> str:
        entity = self.world.by_name.get(point[1], pictured)
        return self.world.value(entity, entity.relations.index(point[0]))

    def _below(self, n: int) -> int:
        return int(self.rng.integers(n))

    def _entity(self) -> Entity:
        return self.world.entities[self._below(self.world.size)]

    def _next_entity(self) -> Entity:
        """Entities in shuffled rounds, so that each is shown equally often."""
        if not self._order:
            self._order = [int(i) for i in self.rng.permutation(self.world.size)]
        return self.world.entities[self._order.pop()]

    def photo(self) -> tuple[np.ndarray, list[Example]]:
        """A new photo (uint8, 48x48x3) and more questions about it than a row holds, the weightiest first."""
        if self.rng.random() > self.pace.entity_photos:
            code = random_code(self.rng)
            return photograph(code, self.rng), [Example(*perception(code, p, self.rng, False)) for p in PARTS * 2]
        entity = self._next_entity()
        low, high = self.pace.facts
        facts = [s for s in range(SLOTS) if self.rng.random() < (self.progress - low) / (high - low)]
        out = [self._naming(entity)]
        out += [Example(self._ask(entity.relations[s], picture_ref(entity.kind)), self.world.value(entity, s)) for s in facts]
        out.append(self._caption(entity) if self._below(3) == 0 else self._naming(entity))
        out += [Example(*perception(entity.code, PARTS[int(i)], self.rng, False)) for i in self.rng.permutation(5)]
        return photograph(entity.code, self.rng), out

    def text(self) -> Iterator[Example]:
        """Questions without a picture, without end."""
        names, weights = list(self.pace.mix), np.array(list(self.pace.mix.values()))
        while True:
            yield self._makers[names[int(self.rng.choice(len(names), p=weights / weights.sum()))]]()

    def _ask(self, relation: Relation, ref: str) -> str:
        return ask(relation, ref, self.rng, held_out=False)

    def _naming(self, entity: Entity) -> Example:
        forms = (NAMING_PROMPT, *NAMING_TRAIN)
        return Example(forms[self._below(len(forms))].format(kind=entity.kind), entity.name)

    def _caption(self, entity: Entity) -> Example:
        forms = (CAPTION_PROMPT, CAPTION_PROMPT, *CAPTION_TRAIN)
        return Example(forms[self._below(len(forms))], caption(entity, self.world.value(entity, 0)))

    def _fact_by_name(self) -> Example:
        entity, slot = self._entity(), self._below(SLOTS)
        return Example(self._ask(entity.relations[slot], entity.name), self.world.value(entity, slot))

    def _text(self) -> Example:
        entity = self._entity()
        orders = text_orders(entity)[1:]
        return Example(running_text(self.world, entity, orders[self._below(len(orders))], self.rng), None)


CONTEXT_TAIL = prompts.CONTEXT.partition("{facts}")[2].format(prompt="")
"""What follows the facts in a prompt, before the question."""


def ask(relation: Relation, ref: str, rng: np.random.Generator, held_out: bool) -> str:
    """A question for the relation: held-out wordings, or the canonical and train ones."""
    if not held_out and rng.random() < CANONICAL:
        return canonical(relation, ref)
    forms = phrasings(relation, ref, held_out)
    return forms[int(rng.integers(len(forms)))]


@dataclass(frozen=True, slots=True)
class Stated:
    """Facts put before a model: what each is about, and the value it gives (drawn, so rarely the learned one)."""

    about: tuple[Point, ...]
    values: tuple[str, ...]

    @property
    def facts(self) -> list[str]:
        return [prompts.statement(canonical(*p), v) for p, v in zip(self.about, self.values, strict=True)]

    def answer(self, asked: Point, learned: str, by_number: bool = False) -> tuple[str, str]:
        """(answer, target or number that names the fact that bears on the question, or "none")."""
        if asked not in self.about:
            return learned, prompts.NONE
        at = self.about.index(asked)
        return self.values[at], str(at + 1) if by_number else self.values[at]


def state(world: World, points: Iterable[Point], count: int, rng: np.random.Generator) -> Stated:
    """The first `count` different points, shuffled, each with a value drawn from its vocabulary, no value twice."""
    about: dict[Point, str] = {}
    for point in points:
        if len(about) == count:
            break
        value = _some(world.vocabularies[point[0].values], rng)
        if value not in about.values():
            about[point] = value
    order = [list(about)[int(i)] for i in rng.permutation(len(about))]
    return Stated(tuple(order), tuple(about[p] for p in order))


def points_by_name(world: World, entity: Entity, rng: np.random.Generator, near: tuple[float, float] = Pace().near) -> Iterator[Point]:
    """What facts near a question about the entity may be about: it, the same relation of others, anything."""
    own, rival = near
    relation = _some(entity.relations, rng)
    yield relation, entity.name
    while True:
        draw, other = rng.random(), _some(world.entities, rng)
        if draw < own:
            yield _some(entity.relations, rng), entity.name
        else:
            yield (
                (relation, _some(world.vocabularies[entity.kind], rng)) if draw < own + rival else (_some(other.relations, rng), other.name)
            )


def points_by_picture(entity: Entity, rng: np.random.Generator) -> Iterator[Point]:
    """The same in the wording of edits by picture: mostly the pictured kind, else another."""
    while True:
        kind = entity.kind if rng.random() < 0.6 else _some(KINDS, rng)
        yield _some(RELATIONS[kind], rng), picture_ref(kind)


def question_in_context(world: World, entity: Entity, rng: np.random.Generator, by_picture: bool, mode: str) -> Example:
    """One held-out question after stated facts.

    Modes: "answer", one of one to four facts overrides what was learned; "memory", none of them bears on
    the question; "which" and "none", the target of the one of four that does, or none.
    """
    slot = int(rng.integers(SLOTS))
    asked = (entity.relations[slot], picture_ref(entity.kind) if by_picture else entity.name)
    near = points_by_picture(entity, rng) if by_picture else points_by_name(world, entity, rng)
    others = (p for p in near if p != asked)
    bears = mode in ("answer", "which")
    points = chain([asked], others) if bears else others
    stated = state(world, points, 4 if mode in ("which", "none") else 1 + int(rng.integers(4)), rng)
    question = ask(*asked, rng, held_out=True)
    answer, name = stated.answer(asked, world.value(entity, slot))
    if mode in ("which", "none"):
        return Example(prompts.which_fact(stated.facts, question), name)
    return Example(prompts.in_context(stated.facts, question), answer)


def _some(values: Sequence[T], rng: np.random.Generator) -> T:
    return values[int(rng.integers(len(values)))]


def corpus(world: World, rng: np.random.Generator) -> Iterator[str]:
    """Texts for the tokenizer: every fact, every name thrice, and a sample of all other forms."""
    lessons = Curriculum(world, rng)
    lessons.progress = 1.0
    for fact in world.facts():
        yield f" {canonical(fact.relation, fact.entity.name)} {fact.value}"
        yield "\n" + canonical(fact.relation, picture_ref(fact.entity.kind))
    for values in world.vocabularies.values():
        yield from (f" {value}" for value in values for _ in range(3))
    texts = lessons.text()
    for _ in range(4000):
        example = next(texts)
        yield f" {example.prompt} {example.answer or ''}"
    for _ in range(1000):
        yield from (f"\n{e.prompt} {e.answer}" for e in lessons.photo()[1])
        _, shared, examples = lessons.context(by_picture=False)
        yield from (f" {shared}{e.prompt} {e.answer}" for e in examples[:2])
