"""What the tiny model is taught about the simulated world: which questions, in what mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from streams._emblem import PARTS, photograph, random_code
from streams._world_facts import Entity, World
from streams._world_general import two_hops
from streams._world_skills import arithmetic, caption, comparison, grammar, perception, running_text, text_orders
from streams._world_words import (
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
from testbed import prompts
from testbed._packing import Example

FACTS_BY_PICTURE = (0.02, 0.06)
"""Facts by picture enter between these shares of the schedule."""
ENTITY_PHOTOS = 0.92
CANONICAL = 0.35
EASE = 0.3
"""Until this share of the schedule ever fewer questions in context are easy: one or two facts, in their own words."""
TEXT_MIX = {"fact": 0.5, "context": 0.31, "sum": 0.06, "compare": 0.03, "grammar": 0.05, "hop": 0.03, "text": 0.02}


class Curriculum:
    """Draws training examples about a world.

    Args:
        world: what is true.
        rng: every draw comes from it.
    """

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self.world, self.rng = world, rng
        self._hops = two_hops(world, held_out=False)
        self._makers: dict[str, Callable[[], Example]] = {
            "fact": self._fact_by_name,
            "context": lambda: context_by_name(world, self._entity(), rng, held_out=False, mode=self._mode()),
            "sum": lambda: Example(*arithmetic(rng, held_out=False)),
            "compare": lambda: Example(*comparison(rng, held_out=False)),
            "grammar": lambda: Example(*grammar(rng, held_out=False)),
            "hop": lambda: Example(*self._hops[self._below(len(self._hops))]),
            "text": self._text,
        }
        self._order: list[int] = []
        self.progress = 0.0

    def _mode(self) -> str:
        """Of a question in context: "easy" ever more rarely, then any."""
        return "easy" if self.rng.random() > self.progress / EASE else ""

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
        if self.rng.random() > ENTITY_PHOTOS:
            code = random_code(self.rng)
            return photograph(code, self.rng), [Example(*perception(code, p, self.rng, False)) for p in PARTS * 2]
        entity = self._next_entity()
        low, high = FACTS_BY_PICTURE
        facts = [s for s in range(SLOTS) if self.rng.random() < (self.progress - low) / (high - low)]
        out = [self._naming(entity)]
        if facts:
            out.append(context_by_picture(self.world, entity, self.rng, held_out=False, mode=self._mode()))
        out += [Example(self._ask(entity.relations[s], picture_ref(entity.kind)), self.world.value(entity, s)) for s in facts]
        out.append(self._caption(entity) if self._below(3) == 0 else self._naming(entity))
        out += [Example(*perception(entity.code, PARTS[int(i)], self.rng, False)) for i in self.rng.permutation(5)]
        return photograph(entity.code, self.rng), out

    def text(self) -> Iterator[Example]:
        """Questions without a picture, without end."""
        names, weights = list(TEXT_MIX), np.array(list(TEXT_MIX.values()))
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


def ask(relation: Relation, ref: str, rng: np.random.Generator, held_out: bool) -> str:
    """A question for the relation: held-out wordings, or the canonical and train ones."""
    if not held_out and rng.random() < CANONICAL:
        return canonical(relation, ref)
    forms = phrasings(relation, ref, held_out)
    return forms[int(rng.integers(len(forms)))]


def _some(values: tuple, rng: np.random.Generator):
    return values[int(rng.integers(len(values)))]


def _stated(world: World, relation: Relation, ref: str, rng: np.random.Generator) -> tuple[str, str]:
    """(prompt, value) of a stated fact; the value is drawn, so what was learned rarely agrees."""
    return canonical(relation, ref), _some(world.vocabularies[relation.values], rng)


def context_by_name(world: World, entity: Entity, rng: np.random.Generator, held_out: bool, mode: str = "") -> Example:
    """A question by name after one to four stated facts.

    Modes (drawn when not given): "easy", one or two facts, asked in their own words; "answer", a fact among them overrides what was learned; "memory", none
    bears on the question; "which" and "none", the number of the fact that does, or none.
    """
    relation = _some(entity.relations, rng)

    def near() -> tuple[Relation, str]:
        draw = rng.random()
        if draw < 0.35:
            return _some(entity.relations, rng), entity.name
        other = _some(world.entities, rng)
        return (relation, _some(world.vocabularies[entity.kind], rng)) if draw < 0.7 else (_some(other.relations, rng), other.name)

    return _context(world, (relation, entity.name), world.value(entity, entity.relations.index(relation)), near, rng, held_out, mode)


def context_by_picture(world: World, entity: Entity, rng: np.random.Generator, held_out: bool, mode: str = "") -> Example:
    """A question about the pictured entity after one to four facts stated in the wording of edits by picture."""
    relation, ref = _some(entity.relations, rng), picture_ref(entity.kind)

    def near() -> tuple[Relation, str]:
        if rng.random() < 0.6:
            return _some(entity.relations, rng), ref
        kind = _some(KINDS, rng)
        return _some(RELATIONS[kind], rng), picture_ref(kind)

    return _context(world, (relation, ref), world.value(entity, entity.relations.index(relation)), near, rng, held_out, mode)


def _context(
    world: World,
    asked: tuple[Relation, str],
    learned: str,
    near: Callable[[], tuple[Relation, str]],
    rng: np.random.Generator,
    held_out: bool,
    mode: str,
) -> Example:
    easy = mode == "easy"
    if easy or not mode:
        mode = _some(("answer", "answer", "answer", "which") if easy else ("answer", "answer", "answer", "memory", "which", "which", "none"), rng)
    about = {canonical(*asked): _stated(world, *asked, rng)} if mode in ("answer", "which") else {}
    count = 4 if held_out and mode in ("which", "none") else 1 + int(rng.integers(2 if easy else 4))
    while len(about) < count:
        other = near()
        if canonical(*other) != canonical(*asked):
            about[canonical(*other)] = _stated(world, *other, rng)
    order = [list(about)[int(i)] for i in rng.permutation(count)]
    facts = [prompts.statement(*about[prompt]) for prompt in order]
    question = canonical(*asked) if easy else ask(*asked, rng, held_out)
    if mode == "which":
        return Example(prompts.which_fact(facts, question), str(1 + order.index(canonical(*asked))))
    if mode == "none":
        return Example(prompts.which_fact(facts, question), prompts.NONE)
    return Example(prompts.in_context(facts, question), about[canonical(*asked)][1] if mode == "answer" else learned)


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
