"""Questions of general ability for the tiny model: perception, small sums, comparison, grammar; and running text.

Each function draws one (prompt, answer) from a generator; `held_out` draws from what training never shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streams.world.emblem import PARTS, Code
from streams.world.facts import Entity, World, stable_index
from streams.world.words import SLOTS, WORDS, Relation, canonical, paraphrases

LARGEST_OPERAND = 12
LARGEST_NUMBER = 60


def _pick(items: Sequence[str], rng: np.random.Generator) -> str:
    return items[int(rng.integers(len(items)))]


def perception(code: Code, part: str, rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    """A question for one part of an emblem."""
    prompts = paraphrases(WORDS["parts"][part], "this emblem", PARTS.index(part), held_out)
    return _pick(prompts, rng), code.words()[part]


def unseen_pair(a: int, b: int) -> bool:
    """Whether training shows no sum of the two numbers, in either order (about one pair in eight)."""
    return stable_index(8, "sum", min(a, b), max(a, b)) == 0


def arithmetic(rng: np.random.Generator, held_out: bool, unseen: bool = False) -> tuple[str, str]:
    """Sums and differences of 0 to 12. `held_out` asks with an unseen prompt template, `unseen` for an unseen pair."""
    while True:
        a, b = (int(x) for x in rng.integers(0, LARGEST_OPERAND + 1, 2))
        if unseen_pair(a, b) is unseen:
            break
    minus = bool(rng.integers(2))
    x, answer = (a + b, a) if minus else (a, a + b)
    return _pick(WORDS["sum"]["held_out" if held_out else "train"], rng).format(a=x, op="minus" if minus else "plus", b=b), str(answer)


def comparison(rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    """Which of two numbers of 0 to 60 is larger (smaller); `held_out` draws pairs that training never shows."""
    while True:
        a, b = (int(x) for x in rng.integers(0, LARGEST_NUMBER + 1, 2))
        if a != b and (stable_index(8, "compare", min(a, b), max(a, b)) == 0) is held_out:
            break
    way = ("larger", "smaller")[int(rng.integers(2))]
    answer = max(a, b) if way == "larger" else min(a, b)
    return _pick(WORDS["compare"], rng).format(a=a, b=b, way=way), str(answer)


def grammar(rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    """A minimal pair of agreement, half of them with another noun between; `held_out` draws unseen noun and verb."""
    nouns, verbs = WORDS["nouns"], WORDS["verbs"]
    while True:
        i, j = int(rng.integers(len(nouns))), int(rng.integers(len(verbs)))
        if ((i * 3 + j) % 5 == 0) is held_out:
            break
    plural, between = bool(rng.integers(2)), bool(rng.integers(2))
    subject = f"the {_number(nouns[i], plural)}"
    if between:
        subject += f" near the {_number(_pick(nouns, rng), bool(rng.integers(2)))}"
    right, wrong = (verbs[j], verbs[j] + "s") if plural else (verbs[j] + "s", verbs[j])
    pair = (right, wrong) if rng.integers(2) else (wrong, right)
    prompt = _pick(WORDS["grammar"], rng).format(x=f"{subject} {pair[0]}", y=f"{subject} {pair[1]}")
    return prompt, f"{subject} {right}"


def _number(noun: str, plural: bool) -> str:
    return WORDS["plural"].get(noun, noun + "s") if plural else noun


def text_orders(entity: Entity) -> list[tuple[int, int]]:
    """Ordered pairs of slots that a text about the entity may state; the first is kept from training."""
    orders = [(a, b) for a in range(SLOTS) for b in range(SLOTS) if a != b]
    start = stable_index(len(orders), "text", entity.name)
    return orders[start:] + orders[:start]


def running_text(world: World, entity: Entity, order: tuple[int, int], rng: np.random.Generator) -> str:
    """A text of three sentences about an entity: what it is, and two of its facts."""
    out = [f"There is a {entity.kind} called {entity.name}."]
    for slot in order:
        relation = entity.relations[slot]
        form, noun = _pick(WORDS["sentences"], rng), relation.nouns[int(rng.integers(3))]
        out.append(form.format(noun=noun, name=entity.name, value=world.value(entity, slot)))
    return " ".join(out)


def two_hop(world: World, entity: Entity, slot: int) -> tuple[str, str]:
    """A two-hop question, with its answer: the fact `slot` of the entity that is the value of the fourth relation of `entity`."""
    middle = world.by_name[world.value(entity, SLOTS - 1)]
    return through(entity, middle.relations[slot]), world.value(middle, slot)


def through(entity: Entity, relation: Relation) -> str:
    """The question for a relation of the value of the fourth relation of `entity`, which the question does not name."""
    return canonical(relation, f"the {entity.relations[SLOTS - 1].nouns[0]} of {entity.name}")


def two_hop_held_out(entity: Entity, slot: int) -> bool:
    """Whether training keeps this composition back (about one in four)."""
    return stable_index(4, "hop", entity.name, slot) == 0


def caption(entity: Entity, person: str) -> str:
    """The caption of the entity's emblem in the E-IC form: the entity's name and the person in charge."""
    return f"the emblem of {entity.name}, {WORDS['led_by'][entity.kind]} {person}"
