"""General questions of the simulated world, which no edit should touch, and the train pool of editors."""

from __future__ import annotations

import numpy as np

from streams.world.emblem import PARTS, Photo, random_code
from streams.world.facts import Entity, World
from streams.world.questions import pool_controls, probe_controls
from streams.world.skills import arithmetic, comparison, grammar, perception, running_text, text_orders, two_hop, two_hop_held_out
from streams.world.words import SLOTS, phrasings, picture_ref
from testbed.core.events import Question

PER_TOPIC = 60


def general_questions(world: World, pictures: bool, per_topic: int = PER_TOPIC) -> tuple[Question, ...]:
    """Up to `per_topic` questions a topic; picture topics only where the form has pictures."""
    rng = np.random.default_rng([world.seed, world.size, 31])
    found = [*_skills(rng, per_topic), *_facts(world, rng, per_topic, "facts"), *_hops(world, per_topic), *_texts(world, rng, per_topic)]
    if pictures:
        found += [*_perception(rng, per_topic, held_out=True), *_facts(world, rng, per_topic, "facts_by_picture", photo=50)]
    return tuple({q.id: q for q in found}.values())


def _skills(rng: np.random.Generator, n: int, held_out: bool = True) -> list[Question]:
    makers = {"arithmetic": arithmetic, "comparison": comparison, "grammar": grammar}
    return [_general(topic, *make(rng, held_out)) for topic, make in makers.items() for _ in range(n)]


def _general(topic: str, prompt: str, answer: str, image: Photo | None = None) -> Question:
    return Question("general", prompt, answer, image=image, topic=topic)


def _perception(rng: np.random.Generator, n: int, held_out: bool) -> list[Question]:
    out = []
    for i in range(n):
        code, part = random_code(rng), PARTS[i % len(PARTS)]
        photo = Photo(code, int(rng.integers(2**31)))
        out.append(_general("perception", *perception(code, part, rng, held_out), image=photo))
    return out


def _fact(world: World, pair: tuple[Entity, int], topic: str, held_out: bool, photo: int | None, rng: np.random.Generator) -> Question:
    """A fact of a control in one of its paraphrases, asked by photo number `photo` or, without one, by name."""
    entity, slot = pair
    prompts = phrasings(entity.relations[slot], entity.name if photo is None else picture_ref(entity.kind), held_out)
    prompt, image = prompts[int(rng.integers(len(prompts)))], None if photo is None else world.photo(entity, photo)
    return _general(topic, prompt, world.value(entity, slot), image)


def _facts(world: World, rng: np.random.Generator, n: int, topic: str, photo: int | None = None) -> list[Question]:
    """Facts of controls in held-out paraphrases."""
    return [_fact(world, pair, topic, True, photo, rng) for pair in _spread(probe_controls(world), rng, n)]


def _spread(entities: list[Entity], rng: np.random.Generator, n: int) -> list[tuple[Entity, int]]:
    pairs = [(e, s) for e in entities for s in range(SLOTS)]
    return [pairs[int(i)] for i in rng.permutation(len(pairs))[:n]]


def two_hops(world: World, held_out: bool, controls: list[Entity] | None = None) -> list[tuple[str, str]]:
    """Compositions of two facts that no edit changes: (prompt, answer), trained ones or held-out ones."""
    out = []
    for entity in world.controls() if controls is None else controls:
        middle = world.by_name[world.value(entity, SLOTS - 1)]
        out += [two_hop(world, entity, s) for s in sorted(middle.frozen) if two_hop_held_out(entity, s) is held_out]
    return out


def _hops(world: World, n: int) -> list[Question]:
    controls = probe_controls(world)
    known = [_general("two_hop", *pair) for pair in two_hops(world, False, controls)[:n]]
    return known + [_general("two_hop_unseen", *pair) for pair in two_hops(world, True, controls)[:n]]


def held_out_texts(world: World, rng: np.random.Generator, n: int) -> list[str]:
    """Running text about controls, each in an order of facts that training never shows."""
    controls = probe_controls(world)
    picks = [controls[int(i)] for i in rng.permutation(len(controls))[:n]]
    return [running_text(world, e, text_orders(e)[0], rng) for e in picks]


def _texts(world: World, rng: np.random.Generator, n: int) -> list[Question]:
    return [Question("text", text, topic="running_text") for text in held_out_texts(world, rng, n)]


def pool_questions(world: World, pictures: bool, n: int = 400) -> tuple[Question, ...]:
    """Questions with answers for editors to train on, in train paraphrases: pool controls and skills."""
    rng = np.random.default_rng([world.seed, world.size, 37])
    out = _skills(rng, n // 8, held_out=False)
    for pair in _spread(pool_controls(world), rng, n):
        photo = 100 + pair[1] if pictures and bool(rng.integers(2)) else None
        out.append(_fact(world, pair, "facts_pool", False, photo, rng))
    if pictures:
        out += _perception(rng, n // 8, held_out=False)
    return tuple({q.id: q for q in out}.values())


def pool_texts(world: World, n: int = 200) -> tuple[str, ...]:
    """Running text for editors: about pool controls, in orders that the held-out text does not use."""
    rng = np.random.default_rng([world.seed, world.size, 41])
    pairs = [(e, order) for e in pool_controls(world) for order in text_orders(e)[1:]]
    return tuple(running_text(world, *pairs[int(i)], rng) for i in rng.permutation(len(pairs))[:n])
