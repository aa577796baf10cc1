"""What a post-editor is taught: to bring an answer into line with a fact, or to say that it stands.

Facts and questions are the simulated world's, by name and in the wording of edits by picture (the post-editor
sees no picture). The answer that it is shown is what a model knew, or now and then something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from streams.world.facts import Entity, World
from streams.world.skills import arithmetic, comparison
from streams.world.words import Relation, canonical, picture_ref
from testbed.editors.retrieval import prompts
from testbed.pretraining.curriculum import Point, ask
from testbed.pretraining.evaluation import Asked
from testbed.pretraining.packing import Example, Packed, Packer

T = TypeVar("T")
ROWS = 24
QUESTIONS = 6
"""Rows of a batch, and questions about each row's fact."""
HEAD = prompts.REWRITE.partition(" {answer}")[0]
"""What all questions about one fact begin with."""


class Rewriting:
    """Draws facts, questions and answers from a world.

    Args:
        world: what a model knew.
        rng: every draw comes from it.
        held_out: question wordings that only gates use.
    """

    def __init__(self, world: World, rng: np.random.Generator, held_out: bool = False) -> None:
        self.world, self.rng, self.held_out = world, rng, held_out

    def row(self) -> tuple[str, list[Example]]:
        """A fact and questions about it: (shared beginning, how prompts go on)."""
        about, entity = self._point()
        value = self._value(about[0])
        shared = HEAD.format(facts=prompts.numbered([prompts.statement(canonical(*about), value)]))
        return shared, [self._example(about, entity, value, shared) for _ in range(QUESTIONS)]

    def gate(self, bears: bool) -> Asked:
        """One question that the fact bears on, or not."""
        about, entity = self._point()
        value = self._value(about[0])
        prompt, answer, wanted = self._question(about, entity, value, bears)
        return Asked(prompts.rewrite(prompts.statement(canonical(*about), value), prompt, answer), wanted)

    def _example(self, about: Point, entity: Entity, value: str, shared: str) -> Example:
        prompt, answer, wanted = self._question(about, entity, value, self.rng.random() < 0.5)
        fact = prompts.statement(canonical(*about), value)
        return Example(prompts.rewrite(fact, prompt, answer).removeprefix(shared), wanted)

    def _question(self, about: Point, entity: Entity, value: str, bears: bool) -> tuple[str, str, str]:
        """(question, answer before, answer wanted)."""
        relation, ref = about
        if bears:
            known = self.world.value(entity, entity.relations.index(relation))
            shown = known if self.rng.random() < 0.8 else self._value(relation)
            return ask(relation, ref, self.rng, self.held_out), shown, value
        prompt, answer = self._other(about, entity)
        return prompt, answer, prompts.RETAIN

    def _other(self, about: Point, entity: Entity) -> tuple[str, str]:
        """A question that the fact does not bear on: its neighbour, a rival, a stranger, a skill."""
        relation, ref = about
        draw = self.rng.random()
        if draw < 0.2:
            make = arithmetic if self.rng.random() < 0.5 else comparison
            return make(self.rng, held_out=self.held_out)
        pictured = ref == picture_ref(entity.kind)
        other, asked = entity, self._some(entity.relations)
        if draw < 0.6:
            asked = self._some([r for r in entity.relations if r != relation])
        else:
            same_kind = draw < 0.85 and not pictured
            other = self._entity(lambda e: e != entity and (e.kind == entity.kind if same_kind else e.kind != entity.kind))
            asked = relation if same_kind else self._some(other.relations)
        named = picture_ref(other.kind) if pictured else other.name
        return ask(asked, named, self.rng, self.held_out), self.world.value(other, other.relations.index(asked))

    def _point(self) -> tuple[Point, Entity]:
        entity = self._entity(lambda e: True)
        ref = picture_ref(entity.kind) if self.rng.random() < 0.3 else entity.name
        return (self._some(entity.relations), ref), entity

    def _entity(self, fits: Callable[[Entity], bool]) -> Entity:
        while True:
            entity = self.world.entities[int(self.rng.integers(self.world.size))]
            if fits(entity):
                return entity

    def _value(self, relation: Relation) -> str:
        return self._some(self.world.vocabularies[relation.values])

    def _some(self, values: Sequence[T]) -> T:
        return values[int(self.rng.integers(len(values)))]


def rewriting_batches(lessons: Rewriting, packer: Packer) -> Callable[[float], Packed]:
    """A maker of batches."""

    def batch(progress: float) -> Packed:
        return packer.batch([packer.row(examples, None, shared) for shared, examples in (lessons.row() for _ in range(ROWS))])

    return batch
