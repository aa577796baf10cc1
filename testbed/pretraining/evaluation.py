"""The tiny model's gates: what it must know and do before any edit, by free generation and exact match."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streams.world.emblem import PARTS, Photo, random_code
from streams.world.facts import Entity, World
from streams.world.general import held_out_texts, two_hops
from streams.world.skills import arithmetic, comparison, grammar, perception
from streams.world.words import NAMING_HELD, SLOTS, picture_ref
from testbed.pretraining.curriculum import ask, question_in_context
from testbed.pretraining.tiny_model import TEXT_ONLY, WITH_IMAGE

NEW_PHOTO = 500
"""Photos of entities from this number on are the gates' own."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of a gate: prompt, answer, and the photo (uint8, 48x48x3) if it has one."""

    prompt: str
    answer: str
    photo: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class GateRow:
    """One measured ability. `gate` is the least acceptable value, absent where it is only reported."""

    ability: str
    value: float
    n: int
    gate: float | None = None
    unit: str = "share right"

    @property
    def passed(self) -> bool | None:
        return None if self.gate is None else self.value >= self.gate


def generate(model: Any, processor: Any, asked: list[Asked], new_tokens: int = 24, batch: int = 128) -> list[str]:
    """Greedy answers, stripped; prompts of similar length are batched, padded on the left."""
    out = [""] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: (asked[i].photo is None, len(asked[i].prompt)))
    while order:
        some = [i for i in order[:batch] if (asked[i].photo is None) is (asked[order[0]].photo is None)]
        order = order[len(some) :]
        for i, text in zip(some, _generate(model, processor, [asked[i] for i in some], new_tokens), strict=True):
            out[i] = text
    return out


def _generate(model: Any, processor: Any, asked: list[Asked], new_tokens: int) -> list[str]:
    if asked[0].photo is None:
        texts = [TEXT_ONLY.format(prompt=a.prompt) for a in asked]
        inputs = processor.tokenizer(texts, return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
    else:
        texts = [WITH_IMAGE.format(prompt=a.prompt) for a in asked]
        inputs = processor(text=texts, images=[a.photo for a in asked], return_tensors="pt", padding=True)
    with torch.inference_mode():
        made = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return [t.strip() for t in processor.tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


def share_right(model: Any, processor: Any, asked: list[Asked]) -> float:
    made = generate(model, processor, asked)
    return float(np.mean([m == a.answer for m, a in zip(made, asked, strict=True)]))


def facts_by_name(world: World, rng: np.random.Generator) -> Asked:
    entity, slot = world.entities[int(rng.integers(world.size))], int(rng.integers(SLOTS))
    return Asked(ask(entity.relations[slot], entity.name, rng, held_out=True), world.value(entity, slot))


def facts_by_picture(world: World, rng: np.random.Generator, twins: bool = False) -> Asked:
    entity = _draw(world, rng, twins)
    slot = int(rng.integers(SLOTS))
    prompt = ask(entity.relations[slot], picture_ref(entity.kind), rng, held_out=True)
    return Asked(prompt, world.value(entity, slot), _new_photo(world, entity, rng))


def _draw(world: World, rng: np.random.Generator, twins: bool) -> Entity:
    while True:
        entity = world.entities[int(rng.integers(world.size))]
        if world.has_near_duplicate(entity) or not twins:
            return entity


def _new_photo(world: World, entity: Entity, rng: np.random.Generator) -> np.ndarray:
    return Photo(entity.code, (world.seed + 1) * 10**6 + NEW_PHOTO + int(rng.integers(10**5))).load()


def naming(world: World, rng: np.random.Generator) -> Asked:
    entity = _draw(world, rng, False)
    form = NAMING_HELD[int(rng.integers(len(NAMING_HELD)))]
    return Asked(form.format(kind=entity.kind), entity.name, _new_photo(world, entity, rng))


def seeing(part: str, rng: np.random.Generator) -> Asked:
    code = random_code(rng)
    return Asked(*perception(code, part, rng, held_out=True), Photo(code, int(rng.integers(2**31))).load())


def context(world: World, rng: np.random.Generator, by_picture: bool, modes: tuple[str, ...]) -> Asked:
    entity, mode = world.entities[int(rng.integers(world.size))], modes[int(rng.integers(len(modes)))]
    example = question_in_context(world, entity, rng, by_picture, mode)
    return Asked(example.prompt, example.answer or "", _new_photo(world, entity, rng) if by_picture else None)


def question_gates(world: World, rng: np.random.Generator) -> dict[str, tuple[float | None, Callable[[], Asked]]]:
    """Name of each ability: its gate, and a maker of its questions."""
    which = ("which", "which", "which", "which", "none")
    gates: dict[str, tuple[float | None, Callable[[], Asked]]] = {
        "facts by name, held-out paraphrase": (0.98, lambda: facts_by_name(world, rng)),
        "facts by picture, new photo, held-out paraphrase": (0.95, lambda: facts_by_picture(world, rng)),
        "the same on twin emblems": (0.93, lambda: facts_by_picture(world, rng, twins=True)),
        "naming the pictured entity": (0.97, lambda: naming(world, rng)),
        "arithmetic, seen pairs, held-out wording": (0.95, lambda: Asked(*arithmetic(rng, held_out=True))),
        "comparison, unseen pairs": (0.95, lambda: Asked(*comparison(rng, held_out=True))),
        "grammatical pairs, unseen combinations": (0.95, lambda: Asked(*grammar(rng, held_out=True))),
        "stated fact against what was learned, by name": (0.9, lambda: context(world, rng, False, ("answer",))),
        "stated fact against what was learned, by picture": (0.9, lambda: context(world, rng, True, ("answer",))),
        "which of four facts bears, or none, by name": (0.9, lambda: context(world, rng, False, which)),
        "which of four facts bears, or none, by picture": (0.9, lambda: context(world, rng, True, which)),
        "facts that do not bear leave memory alone, by name": (None, lambda: context(world, rng, False, ("memory",))),
        "facts that do not bear leave memory alone, by picture": (None, lambda: context(world, rng, True, ("memory",))),
        "unseen sums": (None, lambda: Asked(*arithmetic(rng, held_out=True, unseen=True))),
    }
    for part in PARTS:
        gates[f"perception: {part}"] = (0.94, lambda part=part: seeing(part, rng))
    return gates


def measure(model: Any, processor: Any, world: World, n: int, seed: int = 0) -> list[GateRow]:
    """Every question gate with n questions a row, two-hop and the perplexity of held-out text."""
    rng = np.random.default_rng([world.seed, world.size, 53, seed])
    rows = []
    for ability, (gate, make) in question_gates(world, rng).items():
        rows.append(GateRow(ability, share_right(model, processor, [make() for _ in range(n)]), n, gate))
    seen = [r for r in rows if r.ability.startswith("perception")]
    rows.append(GateRow("perception: mean", float(np.mean([r.value for r in seen])), n * len(seen), 0.97))
    for held_out, label in ((False, "two-hop, trained compositions"), (True, "two-hop, held-out compositions")):
        asked = [Asked(*pair) for pair in two_hops(world, held_out)[:n]]
        if asked:
            rows.append(GateRow(label, share_right(model, processor, asked), len(asked)))
    texts = held_out_texts(world, rng, n)
    rows.append(GateRow("held-out running text", perplexity(model, processor, texts), len(texts), None, "perplexity per token"))
    return rows


def perplexity(model: Any, processor: Any, texts: list[str]) -> float:
    """exp of the mean negative log-likelihood a token, BOS given, end token not counted."""
    total, count = 0.0, 0
    for text in texts:
        ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(total / count)
