"""Make the prompts and questions about changes of the simulated world, in one of several forms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from streams.world.emblem import Photo
from streams.world.facts import FAMILY, Entity, World, WorldFact, stable_index
from streams.world.history import WorldChange
from streams.world.skills import arithmetic, caption, through
from streams.world.words import CAPTION_HELD, CAPTION_PROMPT, CAPTION_TRAIN, KINDS, SLOTS, canonical, phrasings, picture_ref
from testbed.core.events import Question, Split

POOL_EVERY = 4
"""Every fourth family's control belongs to the train pool, and no probe asks about it."""


@dataclass(frozen=True, slots=True)
class QuestionForm:
    """The form of edits and questions.

    `pictures`: they show a photo (else they name the entity); `captions`: the target is a sentence; `slots`: the
    relations that may change; `new_photos`: the number of image rephrases of an edit.
    """

    name: str
    pictures: bool
    captions: bool = False
    slots: tuple[int, ...] = tuple(range(SLOTS))
    new_photos: int = 1


def in_pool(entity: Entity) -> bool:
    """Whether the entity's family lends its control to the train pool."""
    return entity.index // FAMILY % POOL_EVERY == POOL_EVERY - 1


def probe_controls(world: World, kind: str | None = None) -> list[Entity]:
    """Controls that probes may ask about."""
    return [e for e in world.controls(kind) if not in_pool(e)]


def pool_controls(world: World) -> list[Entity]:
    """Controls whose facts editors may train on."""
    return [e for e in world.controls() if in_pool(e)]


class QuestionMaker:
    """Makes prompts, answers and questions of one world in one form."""

    def __init__(self, world: World, form: QuestionForm) -> None:
        self.world, self.form = world, form
        last = SLOTS - 1
        self._pointing = {world.value(e, last): e for e in reversed(world.entities) if last in e.frozen}
        """For the name of an entity the first entity whose fourth relation has it as its value and never changes."""
        self._controls = {kind: probe_controls(world, kind) for kind in KINDS}

    def ref(self, entity: Entity) -> str:
        return picture_ref(entity.kind) if self.form.pictures else entity.name

    def photo(self, entity: Entity, number: int = 0) -> Photo | None:
        return self.world.photo(entity, number) if self.form.pictures else None

    def edit_prompt(self, fact: WorldFact) -> tuple[str, Photo | None]:
        """The prompt and the picture of an edit of this fact."""
        prompt = CAPTION_PROMPT if self.form.captions else canonical(fact.relation, self.ref(fact.entity))
        return prompt, self.photo(fact.entity)

    def answer(self, fact: WorldFact, value: str) -> str:
        """What the model should say when the fact has this value."""
        return caption(fact.entity, value) if self.form.captions else value

    def train_prompts(self, fact: WorldFact) -> tuple[str, ...]:
        return CAPTION_TRAIN if self.form.captions else phrasings(fact.relation, self.ref(fact.entity), held_out=False)

    def held_out_prompts(self, fact: WorldFact) -> tuple[str, ...]:
        """Two paraphrases that neither training nor an editor sees, the same for a fact at every date."""
        every = CAPTION_HELD if self.form.captions else phrasings(fact.relation, self.ref(fact.entity), held_out=True)
        first = stable_index(len(every), "held", fact.entity.name, fact.slot)
        return every[first], every[(first + 1) % len(every)]

    def questions(self, change: WorldChange, event_id: str) -> tuple[Question, ...]:
        """All questions about a change; the right answer about the changed fact is the value after the change."""
        questions = [*self._about(change), *self._around(change.fact), *self._portability(change)]
        return tuple(replace(q, event_id=event_id, id="") for q in questions)

    def _about(self, change: WorldChange) -> Iterator[Question]:
        fact = change.fact
        answer, (prompt, photo) = self.answer(fact, change.value), self.edit_prompt(fact)
        yield Question("edit", prompt, answer, image=photo)
        for held in self.held_out_prompts(fact):
            yield Question("text_generality", held, answer, image=photo)
        for number in range(1, 1 + self.form.new_photos):
            yield Question("image_generality", prompt, answer, image=self.photo(fact.entity, number))
        yield Question("stale", prompt, self.answer(fact, change.previous), image=photo)

    def _around(self, fact: WorldFact) -> Iterator[Question]:
        entity, hard = fact.entity, self._hard_control(fact.entity)
        topic = "twin" if hard is self.world.near_duplicate(entity) and self.world.has_near_duplicate(entity) else "same kind"
        yield self._locality("locality_hard", self.world.fact(hard, fact.slot), topic)
        sibling = min(entity.frozen)
        prompt = canonical(entity.relations[sibling], self.ref(entity))
        yield Question("locality_sibling", prompt, self.world.value(entity, sibling), image=self.photo(entity))
        others = [kind for kind in self._controls if kind != entity.kind]
        far = self._pick(others[stable_index(3, "kind", entity.name, fact.slot)], "far", fact)
        yield self._locality("locality_far", self.world.fact(far, fact.slot), far.kind)
        yield self._text_locality(fact)

    def _hard_control(self, entity: Entity) -> Entity:
        """The entity's family control, or another of the kind where that one is in the train pool."""
        near_duplicate = self.world.near_duplicate(entity)
        return self._pick(entity.kind, "hard", self.world.fact(entity, 0)) if in_pool(near_duplicate) else near_duplicate

    def _pick(self, kind: str, purpose: str, fact: WorldFact) -> Entity:
        among = self._controls[kind]
        return among[stable_index(len(among), purpose, fact.entity.name, fact.slot)]

    def _locality(self, split: Split, fact: WorldFact, topic: str) -> Question:
        prompt, photo = self.edit_prompt(fact)
        return Question(split, prompt, self.answer(fact, fact.value), image=photo, topic=topic)

    def _text_locality(self, fact: WorldFact) -> Question:
        if not self.form.pictures:
            seed = stable_index(2**32, "text", fact.entity.name, fact.slot)
            prompt, answer = arithmetic(np.random.default_rng(seed), held_out=True)
            return Question("locality_text", prompt, answer, topic="arithmetic")
        near = self._pick(fact.entity.kind, "text", fact)
        prompt = canonical(near.relations[fact.slot], near.name)
        return Question("locality_text", prompt, self.world.value(near, fact.slot), topic="fact by name")

    def _portability(self, change: WorldChange) -> Iterator[Question]:
        """With pictures, the edited fact by the entity's name; else two-hop questions, with the edited fact first or second.

        The other hop is a fact that never changes. Training shows no such composition, and a question whose answer the
        change leaves as it was is left out.
        """
        if self.form.pictures:
            yield Question("portability", canonical(change.fact.relation, change.fact.entity.name), change.value, topic="cross_modal")
            return
        fact, names = change.fact, self.world.by_name
        if fact.slot == SLOTS - 1:
            middle, before = names[change.value], names[change.previous]
            slot = min(middle.frozen)
            prompt, answer = through(fact.entity, middle.relations[slot]), self.world.value(middle, slot)
            if answer != self.world.value(before, slot):
                yield Question("portability", prompt, answer, topic="hop_first")
        if entity := self._pointing.get(fact.entity.name):
            yield Question("portability", through(entity, fact.relation), change.value, topic="hop_second")
