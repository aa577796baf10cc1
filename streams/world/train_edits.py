"""Edits of the simulated world for methods that learn to edit: of entities that no event changes and no probe asks about."""

from __future__ import annotations

from collections.abc import Iterator

from streams.base import TrainEdit
from streams.world.facts import WorldFact, stable_index
from streams.world.questions import QuestionMaker, pool_controls
from testbed.core.events import Ask, EditEvent, Question, Split

TARGETS = 4
"""New values of each fact."""


def train_edits(maker: QuestionMaker) -> Iterator[TrainEdit]:
    """Every fact of the entities of the train pool with `TARGETS` other values of its relation."""
    for entity in pool_controls(maker.world):
        for slot in maker.form.slots:
            fact = maker.world.fact(entity, slot)
            values = [v for v in maker.world.vocabularies[fact.relation.values] if v not in (fact.value, entity.name)]
            start = stable_index(len(values), "train edit", entity.name, slot)
            for n in range(min(TARGETS, len(values))):
                yield _train_edit(maker, fact, values[(start + n * len(values) // TARGETS) % len(values)])


def _train_edit(maker: QuestionMaker, fact: WorldFact, value: str) -> TrainEdit:
    entity, relation = fact.entity, fact.relation.name
    prompt, photo = maker.edit_prompt(fact)
    target, previous = maker.answer(fact, value), maker.answer(fact, fact.value)
    event = EditEvent("add", 0.0, 0, prompt, target, photo, previous, entity.name, relation, source=f"world {maker.world.seed}, train pool")
    reworded = [Ask(p, photo, relation=relation) for p in maker.train_prompts(fact)]
    reworded += [Ask(prompt, maker.photo(entity, n), relation=relation) for n in range(1, 1 + maker.form.new_photos)]
    return TrainEdit(event, tuple(reworded), tuple(_around(maker, fact)))


def _around(maker: QuestionMaker, fact: WorldFact) -> Iterator[Question]:
    """The same question about another entity of the pool, and another about the same one."""
    others = [e for e in pool_controls(maker.world) if e.kind == fact.entity.kind and e is not fact.entity]
    if others:
        other = maker.world.fact(others[stable_index(len(others), "beside", fact.entity.name, fact.slot)], fact.slot)
        yield _stays(maker, other, "locality_hard")
    if len(maker.form.slots) > 1:
        yield _stays(maker, maker.world.fact(fact.entity, (fact.slot + 1) % len(maker.form.slots)), "locality_sibling")


def _stays(maker: QuestionMaker, fact: WorldFact, split: Split) -> Question:
    prompt, photo = maker.edit_prompt(fact)
    return Question(split, prompt, maker.answer(fact, fact.value), image=photo, topic=fact.relation.name)
