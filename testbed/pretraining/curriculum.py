"""Training examples about the simulated world for the tiny model: kinds of questions, and their shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np

from streams.world import words
from streams.world.emblem import PARTS, photograph, random_code
from streams.world.facts import Entity, World
from streams.world.general import two_hops
from streams.world.skills import arithmetic, caption, comparison, grammar, perception, running_text, text_orders
from streams.world.words import KINDS, RELATIONS, SLOTS, Relation, canonical, phrasings, picture_ref
from testbed.editors.retrieval import prompts
from testbed.pretraining.packing import Example

T = TypeVar("T")
FactKey = tuple[Relation, str]
"""The subject of a question or of a stated fact: a relation, and the words that refer to the entity."""
CANONICAL = 0.35
"""Share of training questions in the canonical phrasing."""
TEXT_SHARES = {"fact": 0.76, "sum": 0.08, "compare": 0.04, "grammar": 0.06, "hop": 0.04, "text": 0.02}


@dataclass(frozen=True, slots=True)
class ExampleMixture:
    """The kinds of examples in a training phase. A pair (low, high) is a range of training progress, in [0, 1]."""

    facts: tuple[float, float] = (0.02, 0.06)
    """Range over which facts by picture are phased in."""
    easy: tuple[float, float] = (0.06, 0.3)
    """Range over which easy rows are phased out: one or two stated facts, each asked for in its own words alone."""
    entity_photos: float = 0.92
    """Share of photos that show entities; the others show random emblems."""
    counts: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    """Probabilities that one, two, three and four facts are stated."""
    near: tuple[float, float] = (0.4, 0.3)
    """Shares of stated facts about the same entity, and of the same relation of another one."""
    text: Mapping[str, float] = field(default_factory=lambda: TEXT_SHARES)
    """Shares of the questions without a picture."""
    by_number: bool = False
    """Whether a question which fact is relevant is answered by the fact's number; otherwise the answer is its target."""


class Curriculum:
    """Draws training examples about a world.

    Args:
        world: the facts to learn.
        rng: generator of every draw.
        mixture: kinds of examples and their shares. The trainer sets `progress`, the share of the training that is done.
    """

    def __init__(self, world: World, rng: np.random.Generator, mixture: ExampleMixture = ExampleMixture()) -> None:
        self.world, self.rng, self.mixture = world, rng, mixture
        self._hops = two_hops(world, held_out=False)
        self._makers: dict[str, Callable[[], Example]] = {
            "fact": self._fact_by_name,
            "sum": lambda: Example(*arithmetic(rng, held_out=False)),
            "compare": lambda: Example(*comparison(rng, held_out=False)),
            "grammar": lambda: Example(*grammar(rng, held_out=False)),
            "hop": lambda: Example(*pick(self._hops, rng)),
            "text": self._text,
        }
        self._next_entity = partial(next, shuffled_rounds(world.entities, rng))
        self.progress = 0.0

    def context(self, by_picture: bool) -> tuple[list[Example], np.ndarray | None, str]:
        """Stated facts with questions that they do or do not answer: (examples, photo or None, shared beginning of all prompts,
        which those of the examples continue)."""
        entity = self._next_entity() if by_picture else self._entity()
        easy = self.rng.random() > self._phased(self.mixture.easy)
        near = fact_keys_by_picture(entity, self.rng) if by_picture else fact_keys_by_name(self.world, entity, self.rng, self.mixture.near)
        count = 1 + (self._below(2) if easy else int(self.rng.choice(4, p=self.mixture.counts)))
        stated = draw_stated_facts(self.world, near, count, self.rng)
        own = [(r, picture_ref(entity.kind) if by_picture else entity.name) for r in entity.relations]
        asked = own if by_picture else [*dict.fromkeys([*stated.about, *own])]
        if easy and (relevant := [key for key in asked if key in stated.about]):
            asked = relevant
        out, shared = [], prompts.in_context(stated.facts, "").removesuffix(CONTEXT_END)
        for key in asked:
            answer, relevant_fact = stated.answer(key, self._learned(key, entity), self.mixture.by_number)
            question = canonical(*key) if easy else self._ask(*key)
            out.append(Example(prompts.in_context(stated.facts, question).removeprefix(shared), answer))
            if key in stated.about or self._below(3) == 0:
                out.append(Example(prompts.which_fact(stated.facts, question).removeprefix(shared), relevant_fact))
        out = shuffled(out, self.rng)
        return out, photograph(entity.code, self.rng) if by_picture else None, shared

    def _phased(self, between: tuple[float, float]) -> float:
        """How far training has gone through a range of progress, as a share; below 0 before it and above 1 after it."""
        low, high = between
        return (self.progress - low) / (high - low)

    def _learned(self, key: FactKey, pictured: Entity) -> str:
        entity = self.world.by_name.get(key[1], pictured)
        return self.world.value(entity, entity.relations.index(key[0]))

    def _below(self, n: int) -> int:
        return int(self.rng.integers(n))

    def _entity(self) -> Entity:
        return pick(self.world.entities, self.rng)

    def photo(self) -> tuple[list[Example], np.ndarray]:
        """More examples about a photo than fit into a row, the most important first, and the new photo, uint8 (48, 48, 3)."""
        if self.rng.random() > self.mixture.entity_photos:
            code = random_code(self.rng)
            photo = photograph(code, self.rng)
            return [Example(*perception(code, p, self.rng, False)) for p in PARTS * 2], photo
        entity = self._next_entity()
        facts = [s for s in range(SLOTS) if self.rng.random() < self._phased(self.mixture.facts)]
        out = [self._naming(entity)]
        out += [Example(self._ask(entity.relations[s], picture_ref(entity.kind)), self.world.value(entity, s)) for s in facts]
        out.append(self._caption(entity) if self._below(3) == 0 else self._naming(entity))
        out += [Example(*perception(entity.code, part, self.rng, False)) for part in shuffled(PARTS, self.rng)]
        return out, photograph(entity.code, self.rng)

    def text(self) -> Iterator[Example]:
        """Examples without a picture, without end."""
        names, weights = list(self.mixture.text), np.array(list(self.mixture.text.values()))
        while True:
            yield self._makers[names[int(self.rng.choice(len(names), p=weights / weights.sum()))]]()

    def _ask(self, relation: Relation, ref: str) -> str:
        return phrase_question(relation, ref, self.rng, held_out=False)

    def _naming(self, entity: Entity) -> Example:
        return Example(pick((words.NAMING_PROMPT, *words.NAMING_TRAIN), self.rng).format(kind=entity.kind), entity.name)

    def _caption(self, entity: Entity) -> Example:
        prompt = pick((words.CAPTION_PROMPT, words.CAPTION_PROMPT, *words.CAPTION_TRAIN), self.rng)
        return Example(prompt, caption(entity, self.world.value(entity, 0)))

    def _fact_by_name(self) -> Example:
        entity, slot = self._entity(), self._below(SLOTS)
        return Example(self._ask(entity.relations[slot], entity.name), self.world.value(entity, slot))

    def _text(self) -> Example:
        entity = self._entity()
        return Example(running_text(self.world, entity, pick(text_orders(entity)[1:], self.rng), self.rng), None)


CONTEXT_END = prompts.CONTEXT.partition("{facts}")[2].format(prompt="")
"""The text between the facts of a prompt and its question."""


def phrase_question(relation: Relation, ref: str, rng: np.random.Generator, held_out: bool) -> str:
    """A question for the relation, drawn from the held-out phrasings or from the canonical one and the training phrasings."""
    if not held_out and rng.random() < CANONICAL:
        return canonical(relation, ref)
    return pick(phrasings(relation, ref, held_out), rng)


@dataclass(frozen=True, slots=True)
class StatedFacts:
    """Facts before a question: their keys, and the value of each (drawn at random, so it is rarely the learned one)."""

    about: tuple[FactKey, ...]
    values: tuple[str, ...]

    @property
    def facts(self) -> list[str]:
        return [prompts.statement(canonical(*p), v) for p, v in zip(self.about, self.values, strict=True)]

    def answer(self, asked: FactKey, learned: str, by_number: bool = False) -> tuple[str, str]:
        """(answer, name of the relevant fact: its target, its number, or the word for none)."""
        if asked not in self.about:
            return learned, prompts.NONE
        at = self.about.index(asked)
        return self.values[at], str(at + 1) if by_number else self.values[at]


def draw_stated_facts(world: World, keys: Iterable[FactKey], count: int, rng: np.random.Generator) -> StatedFacts:
    """The first `count` different keys, shuffled, each with a value drawn from its vocabulary, no value twice."""
    about: dict[FactKey, str] = {}
    for key in keys:
        if len(about) == count:
            break
        value = pick(world.vocabularies[key[0].values], rng)
        if value not in about.values():
            about[key] = value
    order = shuffled(list(about), rng)
    return StatedFacts(tuple(order), tuple(about[p] for p in order))


def fact_keys_by_name(
    world: World, entity: Entity, rng: np.random.Generator, near: tuple[float, float] = ExampleMixture().near
) -> Iterator[FactKey]:
    """Keys of facts to state before a question about the entity: about it, the same relation of other entities, or any."""
    same_entity, same_relation = near
    relation = pick(entity.relations, rng)
    yield relation, entity.name
    while True:
        draw, other = rng.random(), pick(world.entities, rng)
        if draw < same_entity:
            yield pick(entity.relations, rng), entity.name
        elif draw < same_entity + same_relation:
            yield relation, pick(world.vocabularies[entity.kind], rng)
        else:
            yield pick(other.relations, rng), other.name


def fact_keys_by_picture(entity: Entity, rng: np.random.Generator) -> Iterator[FactKey]:
    """The same in the words of edits by picture: mostly about the pictured kind of entity, otherwise about another kind."""
    while True:
        kind = entity.kind if rng.random() < 0.6 else pick(KINDS, rng)
        yield pick(RELATIONS[kind], rng), picture_ref(kind)


def question_in_context(world: World, entity: Entity, rng: np.random.Generator, by_picture: bool, mode: str) -> Example:
    """One held-out question after stated facts.

    Modes: "answer", one of one to four facts overrides the learned one; "memory", none of them is relevant to the
    question; "which" and "none", the question is which of four facts is relevant: one of them, or none.
    """
    slot = int(rng.integers(SLOTS))
    asked = (entity.relations[slot], picture_ref(entity.kind) if by_picture else entity.name)
    near = fact_keys_by_picture(entity, rng) if by_picture else fact_keys_by_name(world, entity, rng)
    others = (key for key in near if key != asked)
    keys = chain([asked], others) if mode in ("answer", "which") else others
    stated = draw_stated_facts(world, keys, 4 if mode in ("which", "none") else 1 + int(rng.integers(4)), rng)
    question = phrase_question(*asked, rng, held_out=True)
    answer, relevant_fact = stated.answer(asked, world.value(entity, slot))
    if mode in ("which", "none"):
        return Example(prompts.which_fact(stated.facts, question), relevant_fact)
    return Example(prompts.in_context(stated.facts, question), answer)


def pick(values: Sequence[T], rng: np.random.Generator) -> T:
    """One of the values, drawn uniformly."""
    return values[int(rng.integers(len(values)))]


def shuffled(values: Sequence[T], rng: np.random.Generator) -> list[T]:
    """The values in random order."""
    return [values[int(i)] for i in rng.permutation(len(values))]


def shuffled_rounds(values: Sequence[T], rng: np.random.Generator) -> Iterator[T]:
    """The values in random rounds without end, so that each is drawn equally often."""
    while True:
        yield from reversed(shuffled(values, rng))


def corpus(world: World, rng: np.random.Generator) -> Iterator[str]:
    """Texts to train the tokenizer on: every fact, every name three times, and a sample of all other examples."""
    curriculum = Curriculum(world, rng)
    curriculum.progress = 1.0
    for fact in world.facts():
        yield f" {canonical(fact.relation, fact.entity.name)} {fact.value}"
        yield "\n" + canonical(fact.relation, picture_ref(fact.entity.kind))
    for values in world.vocabularies.values():
        yield from (f" {value}" for value in values for _ in range(3))
    texts = curriculum.text()
    for _ in range(4000):
        example = next(texts)
        yield f" {example.prompt} {example.answer or ''}"
    for _ in range(1000):
        yield from (f"\n{e.prompt} {e.answer}" for e in curriculum.photo()[0])
        examples, _, shared = curriculum.context(by_picture=False)
        yield from (f" {shared}{e.prompt} {e.answer}" for e in examples[:2])
