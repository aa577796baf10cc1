"""Evaluation of the tiny model before any edit: abilities by free generation and exact match, with acceptance thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from streams.base import StreamConfig, TrainPool
from streams.world.emblem import PARTS, Photo, random_code
from streams.world.facts import Entity, World
from streams.world.general import held_out_texts, two_hops
from streams.world.history import History, WorldChange
from streams.world.questions import QuestionForm, QuestionMaker
from streams.world.skills import arithmetic, comparison, grammar, perception
from streams.world.words import NAMING_HELD, SLOTS, picture_ref
from testbed.core.events import Ask, EditBatch, EditEvent
from testbed.editors.baselines.finetune import Finetune, FinetuneConfig
from testbed.model.handle import ModelHandle
from testbed.model.image_loading import Decoded
from testbed.model.predictor import ModelPredictor, Predictor
from testbed.pretraining.curriculum import phrase_question, pick, question_in_context
from testbed.pretraining.packing import Example

NEW_PHOTO = 500
"""Photos of entities from this number on are used for evaluation alone."""
DAMAGE_RATE, DAMAGE_STEPS = 2.5e-3, 20
"""Learning rate and steps of each edit in `sibling_damage`."""


@dataclass(frozen=True, slots=True)
class AbilityScore:
    """The measured value of one ability. `threshold` is the least acceptable value; None where the value is only reported."""

    ability: str
    value: float
    n: int
    """Number of questions."""
    threshold: float | None = None
    unit: str = "share right"

    @property
    def passed(self) -> bool | None:
        return None if self.threshold is None else self.value >= self.threshold


def generate(handle: ModelHandle, questions: Sequence[Example], new_tokens: int = 24, edited: Predictor | None = None) -> list[str]:
    """Greedy answers, stripped, of the model or of the edited one."""
    asks = [Ask(q.prompt, None if q.photo is None else Decoded(str(i), q.photo)) for i, q in enumerate(questions)]
    handle.cache.clear()  # photos are cached by their keys
    made = (edited or ModelPredictor(handle)).generate(asks, new_tokens)
    return [text.strip() for text in made]


def share_right(handle: ModelHandle, questions: Sequence[Example], edited: Predictor | None = None) -> float:
    """The share of questions whose generated answer equals the expected one."""
    made = generate(handle, questions, edited=edited)
    return float(np.mean([m == q.answer for m, q in zip(made, questions, strict=True)]))


def _fact_by_name(world: World, rng: np.random.Generator) -> Example:
    entity, slot = pick(world.entities, rng), int(rng.integers(SLOTS))
    return Example(phrase_question(entity.relations[slot], entity.name, rng, held_out=True), world.value(entity, slot))


def _fact_by_picture(world: World, rng: np.random.Generator, near_duplicates: bool = False) -> Example:
    """A question about the photo of an entity; with `near_duplicates`, of one whose emblem differs in a single part from another's."""
    entity = pick(world.entities, rng)
    while near_duplicates and not world.has_near_duplicate(entity):
        entity = pick(world.entities, rng)
    slot = int(rng.integers(SLOTS))
    prompt = phrase_question(entity.relations[slot], picture_ref(entity.kind), rng, held_out=True)
    return Example(prompt, world.value(entity, slot), _new_photo(world, entity, rng))


def _new_photo(world: World, entity: Entity, rng: np.random.Generator) -> np.ndarray:
    return Photo(entity.code, (world.seed + 1) * 10**6 + NEW_PHOTO + int(rng.integers(10**5))).load()


def _naming(world: World, rng: np.random.Generator) -> Example:
    entity = pick(world.entities, rng)
    return Example(pick(NAMING_HELD, rng).format(kind=entity.kind), entity.name, _new_photo(world, entity, rng))


def _seeing(part: str, rng: np.random.Generator) -> Example:
    code = random_code(rng)
    return Example(*perception(code, part, rng, held_out=True), Photo(code, int(rng.integers(2**31))).load())


def _in_context(world: World, rng: np.random.Generator, by_picture: bool, modes: tuple[str, ...]) -> Example:
    entity, mode = pick(world.entities, rng), pick(modes, rng)
    example = question_in_context(world, entity, rng, by_picture, mode)
    return replace(example, photo=_new_photo(world, entity, rng)) if by_picture else example


def ability_questions(world: World, rng: np.random.Generator) -> dict[str, tuple[float | None, Callable[[], Example]]]:
    """By the name of each ability, its acceptance threshold and a function that draws a question."""
    which = ("which", "which", "which", "which", "none")
    out: dict[str, tuple[float | None, Callable[[], Example]]] = {
        "facts by name, held-out paraphrase": (0.98, lambda: _fact_by_name(world, rng)),
        "facts by picture, new photo, held-out paraphrase": (0.95, lambda: _fact_by_picture(world, rng)),
        "the same on near-duplicate emblems": (0.93, lambda: _fact_by_picture(world, rng, near_duplicates=True)),
        "naming the pictured entity": (0.97, lambda: _naming(world, rng)),
        "arithmetic, seen pairs, held-out wording": (0.95, lambda: Example(*arithmetic(rng, held_out=True))),
        "comparison, unseen pairs": (0.95, lambda: Example(*comparison(rng, held_out=True))),
        "grammatical pairs, unseen combinations": (0.95, lambda: Example(*grammar(rng, held_out=True))),
        "stated fact against what was learned, by name": (0.9, lambda: _in_context(world, rng, False, ("answer",))),
        "stated fact against what was learned, by picture": (0.9, lambda: _in_context(world, rng, True, ("answer",))),
        "which of four facts bears, or none, by name": (0.9, lambda: _in_context(world, rng, False, which)),
        "which of four facts bears, or none, by picture": (0.9, lambda: _in_context(world, rng, True, which)),
        "facts that do not bear leave memory alone, by name": (None, lambda: _in_context(world, rng, False, ("memory",))),
        "facts that do not bear leave memory alone, by picture": (None, lambda: _in_context(world, rng, True, ("memory",))),
        "unseen sums": (None, lambda: Example(*arithmetic(rng, held_out=True, unseen=True))),
    }
    for part in PARTS:
        out[f"perception: {part}"] = (0.94, lambda part=part: _seeing(part, rng))
    return out


def measure(handle: ModelHandle, world: World, n: int, seed: int = 0) -> list[AbilityScore]:
    """The score of every ability on n questions each, of two-hop questions, and the perplexity of held-out text."""
    rng = np.random.default_rng([world.seed, world.size, 53, seed])
    out = []
    for ability, (threshold, draw) in ability_questions(world, rng).items():
        out.append(AbilityScore(ability, share_right(handle, [draw() for _ in range(n)]), n, threshold))
    seen = [s for s in out if s.ability.startswith("perception")]
    out.append(AbilityScore("perception: mean", float(np.mean([s.value for s in seen])), n * len(seen), 0.97))
    for held_out, label in ((False, "two-hop, trained compositions"), (True, "two-hop, held-out compositions")):
        questions = [Example(*pair) for pair in two_hops(world, held_out)[:n]]
        if questions:
            out.append(AbilityScore(label, share_right(handle, questions), len(questions)))
    texts = held_out_texts(world, rng, n)
    logprobs = np.concatenate(ModelPredictor(handle).text_logprobs(texts))
    out.append(AbilityScore("held-out running text", float(np.exp(-logprobs.mean())), len(texts), None, "perplexity per token"))
    return out


def sibling_damage(handle: ModelHandle, world: World, n: int, edits: int = 50) -> list[AbilityScore]:
    """Scores of sibling facts before and after fine-tuning the last down-projection on `edits` edits by picture in sequence.

    Sibling facts are the unchanged relations of the edited entities, asked by picture in held-out phrasings and with new
    photos. Without such damage, sequential editing would have nothing to measure.
    """
    changes = History(world, StreamConfig(revise=0, revert=0, retire=0)).first(edits)
    questions, maker = _siblings(world, changes, n), QuestionMaker(world, QuestionForm("damage", pictures=True))
    editor = Finetune(FinetuneConfig(layer=-1, lr=DAMAGE_RATE, steps=DAMAGE_STEPS))
    editor.prepare(handle, TrainPool())
    for step, change in enumerate(changes, 1):
        prompt, photo = maker.edit_prompt(change.fact)
        editor.apply(EditBatch((EditEvent("add", float(step), step, prompt, change.value, photo),), step))
    before, after = share_right(handle, questions), share_right(handle, questions, editor.predictor())
    title = f"plain fine-tuning of the last down-projection, {edits} edits at {DAMAGE_RATE}"
    return [
        AbilityScore(f"{title}: sibling facts before", before, len(questions)),
        AbilityScore(f"{title}: sibling facts lost", before - after, len(questions), 0.1, "share lost"),
    ]


def _siblings(world: World, changes: list[WorldChange], n: int) -> list[Example]:
    rng = np.random.default_rng([world.seed, world.size, 59])
    edited = {(c.fact.entity.index, c.fact.slot) for c in changes}
    entities = {c.fact.entity.index: c.fact.entity for c in changes}
    facts = [(e, s) for e in entities.values() for s in range(4) if (e.index, s) not in edited]
    out = []
    for i in range(n):
        entity, slot = facts[i % len(facts)]
        prompt = phrase_question(entity.relations[slot], picture_ref(entity.kind), rng, held_out=True)
        out.append(Example(prompt, world.value(entity, slot), world.photo(entity, NEW_PHOTO + i).load()))
    return out
