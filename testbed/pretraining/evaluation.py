"""Evaluation of the tiny model before any edit: abilities by free generation and exact match, with acceptance thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from streams.base import StreamConfig
from streams.world.emblem import PARTS, Photo, random_code
from streams.world.facts import Entity, World
from streams.world.general import held_out_texts, two_hops
from streams.world.history import History, WorldChange
from streams.world.questions import QuestionForm, QuestionMaker
from streams.world.skills import arithmetic, comparison, grammar, perception
from streams.world.words import NAMING_HELD, SLOTS, picture_ref
from testbed.pretraining.curriculum import phrase_question, pick, question_in_context
from testbed.pretraining.packing import Example
from testbed.pretraining.tiny_model import TEXT_ONLY, WITH_IMAGE

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


def generate(model: Any, processor: Any, questions: Sequence[Example], new_tokens: int = 24, batch: int = 128) -> list[str]:
    """Greedy answers, stripped. Prompts of similar length share a batch, padded on the left."""
    out = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: (questions[i].photo is None, len(questions[i].prompt)))
    while order:
        some = [i for i in order[:batch] if (questions[i].photo is None) is (questions[order[0]].photo is None)]
        order = order[len(some) :]
        for i, text in zip(some, _generate(model, processor, [questions[i] for i in some], new_tokens), strict=True):
            out[i] = text
    return out


def _generate(model: Any, processor: Any, questions: list[Example], new_tokens: int) -> list[str]:
    if questions[0].photo is None:
        texts = [TEXT_ONLY.format(prompt=q.prompt) for q in questions]
        inputs = processor.tokenizer(texts, return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
    else:
        texts = [WITH_IMAGE.format(prompt=q.prompt) for q in questions]
        inputs = processor(text=texts, images=[q.photo for q in questions], return_tensors="pt", padding=True)
    with torch.inference_mode():
        made = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return [t.strip() for t in processor.tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


def share_right(model: Any, processor: Any, questions: Sequence[Example]) -> float:
    """The share of questions whose generated answer equals the expected one."""
    made = generate(model, processor, questions)
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


def measure(model: Any, processor: Any, world: World, n: int, seed: int = 0) -> list[AbilityScore]:
    """The score of every ability on n questions each, of two-hop questions, and the perplexity of held-out text."""
    rng = np.random.default_rng([world.seed, world.size, 53, seed])
    out = []
    for ability, (threshold, draw) in ability_questions(world, rng).items():
        out.append(AbilityScore(ability, share_right(model, processor, [draw() for _ in range(n)]), n, threshold))
    seen = [s for s in out if s.ability.startswith("perception")]
    out.append(AbilityScore("perception: mean", float(np.mean([s.value for s in seen])), n * len(seen), 0.97))
    for held_out, label in ((False, "two-hop, trained compositions"), (True, "two-hop, held-out compositions")):
        questions = [Example(*pair) for pair in two_hops(world, held_out)[:n]]
        if questions:
            out.append(AbilityScore(label, share_right(model, processor, questions), len(questions)))
    texts = held_out_texts(world, rng, n)
    out.append(AbilityScore("held-out running text", perplexity(model, processor, texts), len(texts), None, "perplexity per token"))
    return out


def perplexity(model: Any, processor: Any, texts: list[str]) -> float:
    """exp of the mean negative log-likelihood of a token, given BOS and without the end token."""
    total, count = 0.0, 0
    for text in texts:
        ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(total / count)


def sibling_damage(model: Any, processor: Any, world: World, n: int, edits: int = 50) -> list[AbilityScore]:
    """Scores of sibling facts before and after fine-tuning the last down-projection on `edits` edits by picture in sequence.

    The weights are restored afterwards. Sibling facts are the unchanged relations of the edited entities, asked by
    picture in held-out phrasings and with new photos. Without such damage, sequential editing would have nothing to measure.
    """
    changes = History(world, StreamConfig(revise=0, revert=0, retire=0)).first(edits)
    questions = _siblings(world, changes, n)
    weight = model.model.language_model.layers[-1].mlp.down_proj.weight
    kept = weight.detach().clone()
    before = share_right(model, processor, questions)
    maker = QuestionMaker(world, QuestionForm("damage", pictures=True))
    model.requires_grad_(False)
    weight.requires_grad_(True)
    for change in changes:
        _fine_tune(model, processor, maker, change, weight)
    after = share_right(model, processor, questions)
    model.requires_grad_(True)
    with torch.no_grad():
        weight.copy_(kept)
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


def _fine_tune(model: Any, processor: Any, maker: QuestionMaker, change: WorldChange, weight: torch.nn.Parameter) -> None:
    prompt, photo = maker.edit_prompt(change.fact)
    if photo is None:
        raise ValueError("this measure edits by picture, but the form has none")
    eos = processor.tokenizer.eos_token
    text = WITH_IMAGE.format(prompt=prompt)
    inputs = processor(text=[f"{text} {change.value}{eos}"], images=[photo.load()], return_tensors="pt")
    shown = processor(text=[text], images=[photo.load()], return_tensors="pt")["input_ids"].shape[1]
    labels = inputs["input_ids"].clone()
    labels[:, :shown] = -100
    optimizer = torch.optim.Adam([weight], lr=DAMAGE_RATE)
    for _ in range(DAMAGE_STEPS):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
