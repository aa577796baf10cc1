"""Damage of plain fine-tuning to the tiny model. Without damage, sequential editing would have nothing to measure on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from streams.base import StreamConfig
from streams.world.facts import World
from streams.world.history import History, WorldChange
from streams.world.questions import QuestionForm, QuestionMaker
from streams.world.words import picture_ref
from testbed.pretraining.curriculum import phrase_question
from testbed.pretraining.evaluation import NEW_PHOTO, AbilityScore, EvaluationQuestion, share_right
from testbed.pretraining.tiny_model import WITH_IMAGE

EDITS, RATE, STEPS = 50, 2.5e-3, 20


def sibling_damage(model: Any, processor: Any, world: World, n: int, edits: int = EDITS) -> list[AbilityScore]:
    """Scores of sibling facts before and after fine-tuning the last down-projection on `edits` edits by picture in sequence.

    The weights are restored afterwards. Sibling facts are the unchanged relations of the edited entities, asked by
    picture in held-out phrasings and with new photos.
    """
    changes = History(world, StreamConfig(revise=0, revert=0, retire=0)).first(edits)
    questions = _siblings(world, changes, n)
    weight = model.model.language_model.layers[-1].mlp.down_proj.weight
    kept = weight.detach().clone()
    before = share_right(model, processor, questions)
    maker = QuestionMaker(world, QuestionForm("damage", pictures=True))
    trained = [p for p in model.parameters() if p.requires_grad and p is not weight]
    for p in trained:
        p.requires_grad_(False)
    for change in changes:
        _fine_tune(model, processor, maker, change, weight)
    after = share_right(model, processor, questions)
    for p in trained:
        p.requires_grad_(True)
    with torch.no_grad():
        weight.copy_(kept)
    title = f"plain fine-tuning of the last down-projection, {edits} edits at {RATE}"
    return [
        AbilityScore(f"{title}: sibling facts before", before, len(questions)),
        AbilityScore(f"{title}: sibling facts lost", before - after, len(questions), 0.1, "share lost"),
    ]


def _siblings(world: World, changes: list[WorldChange], n: int) -> list[EvaluationQuestion]:
    rng = np.random.default_rng([world.seed, world.size, 59])
    edited = {(c.fact.entity.index, c.fact.slot) for c in changes}
    entities = {c.fact.entity.index: c.fact.entity for c in changes}
    facts = [(e, s) for e in entities.values() for s in range(4) if (e.index, s) not in edited]
    out = []
    for i in range(n):
        entity, slot = facts[i % len(facts)]
        prompt = phrase_question(entity.relations[slot], picture_ref(entity.kind), rng, held_out=True)
        out.append(EvaluationQuestion(prompt, world.value(entity, slot), world.photo(entity, NEW_PHOTO + i).load()))
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
    optimizer = torch.optim.Adam([weight], lr=RATE)
    for _ in range(STEPS):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
