"""The courses that `testbed.pretrain` runs: the simulated world from scratch, a stream's beliefs, rewriting answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from streams.world.facts import World
from testbed.core.events import Question
from testbed.pretraining.beliefs import Beliefs, belief_batches, belief_questions, belief_texts, gather, reading_questions
from testbed.pretraining.curriculum import Curriculum, Pace, corpus
from testbed.pretraining.evaluation import GateRow, measure, share_right
from testbed.pretraining.finetune_damage import sibling_damage
from testbed.pretraining.packing import Packer
from testbed.pretraining.rewriting import Rewriting, rewriting_batches
from testbed.pretraining.tiny_model import build_model, build_processor, build_tokenizer, load, save
from testbed.pretraining.tokenizer_extension import extend_model, extend_tokenizer
from testbed.pretraining.training import Schedule, train, train_tower, world_batches

Progress = Callable[[str, float, float], None]
"""Called with the stage, the share of it that is done, and the loss."""
TOWER_STEPS = 1400
LESSONS = (2, 3, 4, 5, 7)
"""Purposes of the legs' generators."""


@dataclass(frozen=True, slots=True)
class Leg:
    """A part of the course about the world."""

    name: str
    schedule: Schedule
    pace: Pace


NOW = (-1.0, -0.5)
POLISH = Pace(
    facts=NOW,
    easy=NOW,
    entity_photos=0.7,
    counts=(0.1, 0.2, 0.3, 0.4),
    mix={"fact": 0.5, "sum": 0.08, "compare": 0.25, "grammar": 0.06, "hop": 0.06, "text": 0.05},
    by_number=True,
)
NAMES = replace(POLISH, near=(0.25, 0.5))
WORLD = (
    Leg("facts", Schedule(steps=2460, stop=0.64), Pace(by_number=True)),
    Leg("context", Schedule(steps=1628, rate=1.5e-3, warm=0.03, rows=(6, 7, 3, 8)), Pace(facts=NOW, easy=(0.0, 0.4), by_number=True)),
    Leg("polish", Schedule(steps=1542, rate=1.5e-3, warm=0.03, rows=(6, 6, 4, 8)), POLISH),
    Leg("names", Schedule(steps=1679, rate=1.5e-3, warm=0.03, rows=(4, 5, 3, 14)), NAMES),
    Leg("quoting", Schedule(steps=900, rate=1.5e-3, warm=0.03, rows=(7, 7, 4, 8)), replace(NAMES, by_number=False)),
)
"""Copying from the prompt is found late and needs many rows of stated facts, so legs of their own. Names alone are told apart only
some 600 steps into "names"; a course with targets for answers from the start did not come to it, with such legs or without."""
BELIEFS = Schedule(steps=1600, minutes=9, rate=1.5e-3, warm=0.05)
BELIEF_GATE = 0.95
REWRITING = Schedule(steps=1200, minutes=15, rate=1e-3, warm=0.05)
REWRITES, LEAVES = "rewrites where the fact bears, held-out wording", "leaves other answers alone, held-out wording"
REWRITING_GATES = {REWRITES: (True, 0.95), LEAVES: (False, 0.95)}
READ = 500
"""Questions behind stated facts by which reading is measured."""
NEW_TOKENS = 2000
"""Most tokens that a course of beliefs adds, so that its words are one token each."""


@dataclass(frozen=True, slots=True)
class Course:
    """What a course leaves behind: gate rows, optimiser steps taken, and for the model card notes and what was learned.

    `learned` is empty where the stream's origin says it.
    """

    rows: list[GateRow]
    steps: int
    notes: tuple[str, ...] = ()
    learned: str = ""


def rng_of(seed: int, purpose: int) -> np.random.Generator:
    """The generator of one purpose of one run: 0 questions about reading, 1 tower, 2 to 5 and 7 lessons, 6 tokenizer, 7 rehearsal
    of beliefs, 8 questions of gates, 9 new crops."""
    return np.random.default_rng(10 * seed + purpose)


def teach_world(world: World, out: Path, seed: int, legs: Sequence[Leg], questions: int, progress: Progress) -> Course:
    """Train the tiny model on a world from nothing, save it to `out`, and measure what was saved."""
    tokenizer = build_tokenizer(corpus(world, rng_of(seed, 6)))
    processor, model, packer = build_processor(tokenizer), build_model(tokenizer, seed), Packer(tokenizer)
    seen = train_tower(model, rng_of(seed, 1), TOWER_STEPS, lambda _, done, loss: progress("vision tower", done, loss))
    steps = 0
    for i, leg in enumerate(legs):
        batches = world_batches(Curriculum(world, rng_of(seed, LESSONS[i]), leg.pace), packer, leg.schedule)
        steps += train(model, packer, batches, leg.schedule, lambda _, done, loss, leg=leg: progress(leg.name, done, loss))
    save(model, processor, out)
    rows = world_gates(out, world, questions)
    return Course(rows, steps, (f"The tower alone told {seen:.1%} of the parts of random emblems.",), learned_world(world))


def learned_world(world: World) -> str:
    return f"simulated world {world.seed} ({world.size:,} entities) by name and by picture, its skills, and reading stated facts"


def world_gates(folder: Path, world: World, questions: int) -> list[GateRow]:
    """Every row of the table of gates, for the model in a folder."""
    model, processor = load(folder)
    return [*measure(model, processor, world, questions), *sibling_damage(model, processor, world, questions)]


@dataclass(frozen=True, slots=True)
class BeliefCourse:
    """Where a course of beliefs starts and what it rehearses.

    `start` is a folder with a model; `world` is rehearsed, so that skills are not lost (None: they may be). `reading`
    is the share of the rows in words that ask behind stated facts.
    """

    start: Path
    world: World | None
    seed: int
    schedule: Schedule = BELIEFS
    reading: float = 0.0


def teach_beliefs(course: BeliefCourse, beliefs: Sequence[Question], out: Path, progress: Progress) -> Course:
    """Train a model to hold the beliefs, save it to `out`, and measure what was saved with new crops.

    Raises ValueError where there are none, or none that can be used.
    """
    groups, lost = gather(beliefs)
    if not groups:
        raise ValueError(f"none of the {len(beliefs)} beliefs can be used: {'; '.join(lost[:3]) or 'there are none'}")
    model, old = load(course.start)
    tokenizer, parents = extend_tokenizer(old.tokenizer, belief_texts(groups), NEW_TOKENS)
    extend_model(model, parents)
    processor, packer = build_processor(tokenizer), Packer(tokenizer)
    rehearsal = None if course.world is None else Curriculum(course.world, rng_of(course.seed, 7))
    lessons = Beliefs(groups, rng_of(course.seed, 2), course.reading)
    batches = belief_batches(lessons, packer, rehearsal)
    steps = train(model, packer, batches, course.schedule, lambda _, done, loss: progress("beliefs", done, loss))
    save(model, processor, out)
    notes = tuple(f"Left out: {line}" for line in lost)
    return Course(belief_gates(out, groups, course), steps, notes)


def belief_gates(folder: Path, groups: list[Any], course: BeliefCourse) -> list[GateRow]:
    """The share of beliefs that a model gives by free generation, with new crops of the photos; after lessons of reading
    also that of stated facts which it follows, or names."""
    model, processor = load(folder)
    asked = belief_questions(groups, rng_of(course.seed, 9))
    rows = [GateRow("beliefs, new crops", share_right(model, processor, asked), len(asked), BELIEF_GATE)]
    lessons = Beliefs(groups, rng_of(course.seed, 0), course.reading)
    if course.reading and lessons.told:
        read = reading_questions(lessons, READ)
        rows.append(GateRow("a stated fact against the belief, followed or named", share_right(model, processor, read), len(read)))
    return rows


def cut(schedule: Schedule, steps: float, minutes: float) -> Schedule:
    """The schedule with another length in steps and another limit in minutes; 0 keeps its own."""
    return replace(schedule, steps=max(1, round(steps)) if steps else schedule.steps, minutes=minutes or schedule.minutes)


def cut_legs(legs: Sequence[Leg], steps: int, minutes: float) -> tuple[Leg, ...]:
    """The legs with `steps` and `minutes` shared out in proportion to the steps that each takes; 0 keeps their own."""
    whole = sum(leg.schedule.steps * leg.schedule.stop for leg in legs)
    return tuple(
        replace(leg, schedule=cut(leg.schedule, leg.schedule.steps * steps / whole, leg.schedule.steps * minutes / whole)) for leg in legs
    )


def teach_rewriting(start: Path, world: World, out: Path, seed: int, schedule: Schedule, questions: int, progress: Progress) -> Course:
    """Train a model in `start` to rewrite answers by stated facts, save it to `out`, and measure what was saved."""
    model, processor = load(start)
    packer = Packer(processor.tokenizer)
    batches = rewriting_batches(Rewriting(world, rng_of(seed, 2)), packer)
    steps = train(model, packer, batches, schedule, lambda _, done, loss: progress("rewriting", done, loss))
    save(model, processor, out)
    model, processor = load(out)
    lessons = Rewriting(world, rng_of(seed, 8), held_out=True)
    rows = [
        GateRow(ability, share_right(model, processor, [lessons.gate(bears) for _ in range(questions)]), questions, gate)
        for ability, (bears, gate) in REWRITING_GATES.items()
    ]
    return Course(
        rows, steps, ("An editor model: it rewrites other models' answers.",), f"rewriting answers about simulated world {world.seed}"
    )
