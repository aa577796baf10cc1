"""The trainings that `testbed.pretrain` runs: the simulated world from nothing, a stream's beliefs, rewriting of answers.

Each trains a model, saves it, and measures the saved model against acceptance thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streams.data import table
from streams.world.facts import World
from testbed.core.events import Question
from testbed.model.loading import load as load_handle
from testbed.pretraining import beliefs as of_beliefs
from testbed.pretraining.beliefs import BeliefExamples, PhotoBeliefs
from testbed.pretraining.curriculum import Curriculum, ExampleMixture, corpus
from testbed.pretraining.evaluation import AbilityScore, measure, share_right, sibling_damage
from testbed.pretraining.packing import Packer
from testbed.pretraining.rewriting import RewritingExamples, rewriting_batches
from testbed.pretraining.tiny_model import build_model, build_processor, build_tokenizer, load, save
from testbed.pretraining.tokenizer_extension import extend_model, extend_tokenizer
from testbed.pretraining.training import TrainingSchedule, train, train_tower, world_batches

StageReport = Callable[[str, float, float], None]
"""Progress callback, called with the name of the stage, the share of it that is done, and the loss."""
TOWER_STEPS = 1400


@dataclass(frozen=True, slots=True)
class TrainingPhase:
    """One phase of the training on the world: its schedule and its mixture of examples."""

    name: str
    schedule: TrainingSchedule
    mixture: ExampleMixture
    generator: int
    """Number of the phase's generator (`rng_of`)."""


_SCHEDULES: dict[str, Any] = table(__file__, "schedules.yaml")
WORLD = tuple(
    TrainingPhase(p["name"], TrainingSchedule(**p["schedule"]), ExampleMixture(**p["mixture"]), p["generator"]) for p in _SCHEDULES["world"]
)
BELIEFS, REWRITING = TrainingSchedule(**_SCHEDULES["beliefs"]), TrainingSchedule(**_SCHEDULES["rewriting"])
BELIEF_THRESHOLD = 0.95
REWRITES, LEAVES = "rewrites where the fact bears, held-out wording", "leaves other answers alone, held-out wording"
REWRITING_ABILITIES = {REWRITES: (True, 0.95), LEAVES: (False, 0.95)}
"""By ability, whether the stated fact is relevant to the question, and the acceptance threshold."""
READING_QUESTIONS = 500
"""Number of questions after stated facts by which reading is measured."""
NEW_TOKENS = 2000
"""Most tokens that a training on beliefs adds, so that the words of the beliefs are one token each."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The measured scores, the number of optimiser steps, and for the model card notes and a description of the content.

    `learned` is empty where the stream's origin describes the content.
    """

    scores: list[AbilityScore]
    steps: int
    notes: tuple[str, ...] = ()
    learned: str = ""


def rng_of(seed: int, purpose: int) -> np.random.Generator:
    """The generator of one purpose of one run: 0 questions about reading, 1 tower, 2 to 5 and 7 training examples, 6 tokenizer,
    7 rehearsal of the world, 8 evaluation of rewriting, 9 new crops."""
    return np.random.default_rng(10 * seed + purpose)


def train_on_world(
    world: World, out: Path, seed: int, phases: Sequence[TrainingPhase], questions: int, report: StageReport
) -> TrainingResult:
    """Train the tiny model on a world from nothing, save it to `out`, and measure the saved model."""
    tokenizer = build_tokenizer(corpus(world, rng_of(seed, 6)))
    processor, model, packer = build_processor(tokenizer), build_model(tokenizer, seed), Packer(tokenizer)
    accuracy = train_tower(model, rng_of(seed, 1), TOWER_STEPS, partial(report, "vision tower"))
    steps = 0
    for phase in phases:
        batches = world_batches(Curriculum(world, rng_of(seed, phase.generator), phase.mixture), packer, phase.schedule)
        steps += train(model, packer, batches, phase.schedule, partial(report, phase.name))
    save(model, processor, out)
    learned = f"simulated world {world.seed} ({world.size:,} entities) by name and by picture, its skills, and reading stated facts"
    note = f"The tower alone classified {accuracy:.1%} of the parts of random emblems correctly."
    return TrainingResult(evaluate_world(out, world, questions), steps, (note,), learned)


def evaluate_world(folder: Path, world: World, questions: int) -> list[AbilityScore]:
    """Every score of the model in a folder on a world, with this number of questions each (fewer where the world has fewer)."""
    handle = load_handle(str(folder), "cpu", "float32")
    return [*measure(handle, world, questions), *sibling_damage(handle, world, questions)]


@dataclass(frozen=True, slots=True)
class BeliefTraining:
    """Settings of a training on beliefs.

    start: folder of the model to start from. world: rehearsed, so that skills are kept; None rehearses nothing.
    reading: share of the rows without a photo whose questions follow stated facts.
    """

    start: Path
    world: World | None
    seed: int
    schedule: TrainingSchedule = BELIEFS
    reading: float = 0.0


def train_on_beliefs(training: BeliefTraining, beliefs: Sequence[Question], out: Path, report: StageReport) -> TrainingResult:
    """Train a model to hold the beliefs, save it to `out`, and measure the saved model with new crops.

    Raises ValueError where there are no beliefs, or none that can be used.
    """
    groups, unreadable = of_beliefs.gather(beliefs)
    if not groups:
        raise ValueError(f"none of the {len(beliefs)} beliefs can be used: {'; '.join(unreadable[:3]) or 'there are none'}")
    model, old = load(training.start)
    tokenizer, parents = extend_tokenizer(old.tokenizer, of_beliefs.belief_texts(groups), NEW_TOKENS)
    extend_model(model, parents)
    packer = Packer(tokenizer)
    rehearsal = None if training.world is None else Curriculum(training.world, rng_of(training.seed, 7))
    batches = of_beliefs.belief_batches(BeliefExamples(groups, rng_of(training.seed, 2), training.reading), packer, rehearsal)
    steps = train(model, packer, batches, training.schedule, partial(report, "beliefs"))
    save(model, build_processor(tokenizer), out)
    return TrainingResult(evaluate_beliefs(out, groups, training), steps, tuple(f"Left out: {line}" for line in unreadable))


def evaluate_beliefs(folder: Path, groups: list[PhotoBeliefs], training: BeliefTraining) -> list[AbilityScore]:
    """The share of beliefs that the model in a folder generates, with new crops of the photos; after a training with reading
    also the share of stated facts that it follows or names."""
    handle = load_handle(str(folder), "cpu", "float32")
    questions = of_beliefs.belief_questions(groups, rng_of(training.seed, 9))
    scores = [AbilityScore("beliefs, new crops", share_right(handle, questions), len(questions), BELIEF_THRESHOLD)]
    examples = BeliefExamples(groups, rng_of(training.seed, 0), training.reading)
    if training.reading and examples.text_only:
        questions = [examples.after_facts(e, overrides=True) for e in examples.text_row(READING_QUESTIONS)]
        ability = "a stated fact against the belief, followed or named"
        scores.append(AbilityScore(ability, share_right(handle, questions), len(questions)))
    return scores


def shorten(schedule: TrainingSchedule, steps: float, minutes: float) -> TrainingSchedule:
    """The schedule with another number of steps and another limit in minutes; 0 keeps its own."""
    return replace(schedule, steps=max(1, round(steps)) if steps else schedule.steps, minutes=minutes or schedule.minutes)


def shorten_phases(phases: Sequence[TrainingPhase], steps: int, minutes: float) -> tuple[TrainingPhase, ...]:
    """The phases with `steps` and `minutes` divided among them in proportion to the steps that each takes; 0 keeps their own."""
    whole = sum(phase.schedule.steps * phase.schedule.stop for phase in phases)
    return tuple(
        replace(p, schedule=shorten(p.schedule, p.schedule.steps * steps / whole, p.schedule.steps * minutes / whole)) for p in phases
    )


def train_rewriting(
    start: Path, world: World, out: Path, seed: int, schedule: TrainingSchedule, questions: int, report: StageReport
) -> TrainingResult:
    """Train the model in `start` to rewrite answers by stated facts, save it to `out`, and measure the saved model."""
    model, processor = load(start)
    packer = Packer(processor.tokenizer)
    batches = rewriting_batches(RewritingExamples(world, rng_of(seed, 2)), packer)
    steps = train(model, packer, batches, schedule, partial(report, "rewriting"))
    save(model, processor, out)
    handle = load_handle(str(out), "cpu", "float32")
    examples, scores = RewritingExamples(world, rng_of(seed, 8), held_out=True), []
    for ability, (relevant, threshold) in REWRITING_ABILITIES.items():
        share = share_right(handle, [examples.question(relevant) for _ in range(questions)])
        scores.append(AbilityScore(ability, share, questions, threshold))
    note = "An editor model: it rewrites other models' answers."
    return TrainingResult(scores, steps, (note,), f"rewriting answers about simulated world {world.seed}")
