"""Questions of general ability for the tiny model: perception, small sums, comparison, grammar; and running text.

Each function draws one (prompt, answer) from a generator; `held_out` draws from what training never shows.
"""

from __future__ import annotations

import numpy as np

from streams.world.emblem import PARTS, Code
from streams.world.facts import Entity, World, stable_index
from streams.world.words import LED_BY, SLOTS, Relation, canonical, paraphrases

PART_NOUNS = {
    "field": ("field colour", "background colour", "main colour"),
    "pattern": ("pattern", "layout", "division"),
    "second": ("second colour", "pattern colour", "other colour"),
    "charge": ("charge", "symbol", "sign"),
    "charge_colour": ("charge colour", "symbol colour", "sign colour"),
}
PERCEPTION_REF = "this emblem"
LARGEST_OPERAND = 12
LARGEST_NUMBER = 60
SUM_TRAIN = ("What is {a} {op} {b}?", "{a} {op} {b} is", "Compute {a} {op} {b}.", "Please give {a} {op} {b}.")
SUM_HELD = ("Tell me {a} {op} {b}.", "Say what {a} {op} {b} is.")
COMPARE = ("Which is {way}, {a} or {b}?", "Of {a} and {b}, name the {way} one.", "Tell me which is {way}, {a} or {b}.")
NOUNS = (
    "dog", "cat", "bird", "horse", "farmer", "teacher", "child", "girl",
    "boy", "king", "sailor", "singer", "baker", "doctor", "lion", "goat",
)  # fmt: skip
PLURAL = {"child": "children"}
VERBS = ("run", "sleep", "eat", "sing", "walk", "wait", "jump", "smile", "work", "swim", "laugh", "dream", "speak", "read", "fall", "stand")
GRAMMAR = ("Which is right, {x} or {y}?", "Tell me which is right, {x} or {y}.", "Which is correct, {x} or {y}?")


def perception(code: Code, part: str, rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    """A question for one part of an emblem."""
    prompts = paraphrases(PART_NOUNS[part], PERCEPTION_REF, PARTS.index(part), held_out)
    return prompts[int(rng.integers(len(prompts)))], code.words()[part]


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
    forms = SUM_HELD if held_out else SUM_TRAIN
    return forms[int(rng.integers(len(forms)))].format(a=x, op="minus" if minus else "plus", b=b), str(answer)


def comparison(rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    """Which of two numbers of 0 to 60 is larger (smaller); `held_out` draws pairs that training never shows."""
    while True:
        a, b = (int(x) for x in rng.integers(0, LARGEST_NUMBER + 1, 2))
        if a != b and (stable_index(8, "compare", min(a, b), max(a, b)) == 0) is held_out:
            break
    way = ("larger", "smaller")[int(rng.integers(2))]
    answer = max(a, b) if way == "larger" else min(a, b)
    return COMPARE[int(rng.integers(len(COMPARE)))].format(a=a, b=b, way=way), str(answer)


def grammar(rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    """A minimal pair of agreement, half of them with another noun between; `held_out` draws unseen noun and verb."""
    while True:
        i, j = int(rng.integers(len(NOUNS))), int(rng.integers(len(VERBS)))
        if ((i * 3 + j) % 5 == 0) is held_out:
            break
    plural, between = bool(rng.integers(2)), bool(rng.integers(2))
    subject = f"the {_number(NOUNS[i], plural)}"
    if between:
        subject += f" near the {_number(NOUNS[int(rng.integers(len(NOUNS)))], bool(rng.integers(2)))}"
    right, wrong = (VERBS[j], VERBS[j] + "s") if plural else (VERBS[j] + "s", VERBS[j])
    pair = (right, wrong) if rng.integers(2) else (wrong, right)
    prompt = GRAMMAR[int(rng.integers(len(GRAMMAR)))].format(x=f"{subject} {pair[0]}", y=f"{subject} {pair[1]}")
    return prompt, f"{subject} {right}"


def _number(noun: str, plural: bool) -> str:
    return PLURAL.get(noun, noun + "s") if plural else noun


SENTENCES = ("The {noun} of {name} is {value}.", "As {noun}, {name} has {value}.", "People know {value} as the {noun} of {name}.")


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
        form, noun = SENTENCES[int(rng.integers(len(SENTENCES)))], relation.nouns[int(rng.integers(3))]
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
    return f"the emblem of {entity.name}, {LED_BY[entity.kind]} {person}"
