"""Training examples for a post-editor, which rewrites an answer by a stated fact or says that the answer stands.

Facts and questions come from the simulated world, by name and in the words of edits by picture (the post-editor gets no
picture). The answer to be rewritten is mostly the one that a model has learned, and sometimes another.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from streams.world.facts import Entity, World
from streams.world.skills import arithmetic, comparison
from streams.world.words import Relation, canonical, picture_ref
from testbed.editors.retrieval import prompts
from testbed.pretraining.curriculum import FactKey, phrase_question, pick
from testbed.pretraining.packing import Example, PackedBatch, Packer

ROWS = 24
"""Rows of a batch."""
QUESTIONS = 6
"""Questions about each row's fact."""
REWRITE_BEGINNING = prompts.REWRITE.partition(" {answer}")[0]
"""The common beginning of all prompts with one fact."""


class RewritingExamples:
    """Draws facts, questions and answers from a world.

    Args:
        world: the facts that the model whose answers are rewritten has learned.
        rng: generator of every draw.
        held_out: draw the phrasings that are kept for evaluation.
    """

    def __init__(self, world: World, rng: np.random.Generator, held_out: bool = False) -> None:
        self.world, self.rng, self.held_out = world, rng, held_out

    def row(self) -> tuple[list[Example], None, str]:
        """Questions about one fact: (examples, no photo, shared beginning of all prompts, which those of the examples continue)."""
        key, entity, value = self._stated_fact()
        fact = prompts.statement(canonical(*key), value)
        shared = REWRITE_BEGINNING.format(facts=prompts.numbered([fact]))
        examples = []
        for _ in range(QUESTIONS):
            prompt, answer, wanted = self._question(key, entity, value, self.rng.random() < 0.5)
            examples.append(Example(prompts.rewrite(fact, prompt, answer).removeprefix(shared), wanted))
        return examples, None, shared

    def question(self, relevant: bool) -> Example:
        """One question to which the stated fact is relevant, or is not."""
        key, entity, value = self._stated_fact()
        prompt, answer, wanted = self._question(key, entity, value, relevant)
        return Example(prompts.rewrite(prompts.statement(canonical(*key), value), prompt, answer), wanted)

    def _question(self, key: FactKey, entity: Entity, value: str, relevant: bool) -> tuple[str, str, str]:
        """(question, answer to be rewritten, expected reply)."""
        relation, ref = key
        if relevant:
            learned = self.world.value(entity, entity.relations.index(relation))
            shown = learned if self.rng.random() < 0.8 else self._value(relation)
            return phrase_question(relation, ref, self.rng, self.held_out), shown, value
        prompt, answer = self._irrelevant_question(key, entity)
        return prompt, answer, prompts.RETAIN

    def _irrelevant_question(self, key: FactKey, entity: Entity) -> tuple[str, str]:
        """(question, answer) about another relation, another entity of the same kind or of another kind, or a skill."""
        relation, ref = key
        draw = self.rng.random()
        if draw < 0.2:
            make = arithmetic if self.rng.random() < 0.5 else comparison
            return make(self.rng, held_out=self.held_out)
        by_picture = ref == picture_ref(entity.kind)
        other, asked = entity, pick(entity.relations, self.rng)
        if draw < 0.6:
            asked = pick([r for r in entity.relations if r != relation], self.rng)
        else:
            same_kind = draw < 0.85 and not by_picture
            other = self._entity(lambda e: e != entity and (e.kind == entity.kind if same_kind else e.kind != entity.kind))
            asked = relation if same_kind else pick(other.relations, self.rng)
        other_ref = picture_ref(other.kind) if by_picture else other.name
        return phrase_question(asked, other_ref, self.rng, self.held_out), self.world.value(other, other.relations.index(asked))

    def _stated_fact(self) -> tuple[FactKey, Entity, str]:
        entity = pick(self.world.entities, self.rng)
        ref = picture_ref(entity.kind) if self.rng.random() < 0.3 else entity.name
        relation = pick(entity.relations, self.rng)
        return (relation, ref), entity, self._value(relation)

    def _entity(self, fits: Callable[[Entity], bool]) -> Entity:
        while True:
            entity = pick(self.world.entities, self.rng)
            if fits(entity):
                return entity

    def _value(self, relation: Relation) -> str:
        return pick(self.world.vocabularies[relation.values], self.rng)


def rewriting_batches(examples: RewritingExamples, packer: Packer) -> Callable[[float], PackedBatch]:
    """A function that draws a batch; progress does not matter to it."""

    def batch(progress: float) -> PackedBatch:
        return packer.batch([packer.row(*examples.row()) for _ in range(ROWS)])

    return batch
