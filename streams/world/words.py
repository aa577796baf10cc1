"""Words of the simulated world: invented names, typed vocabularies, relations and prompt templates for them.

Every paraphrase is a combination of a structure and a noun for the relation. The canonical question of a
relation is the prompt of its edits; the other combinations fall, by a fixed rule, into *train* paraphrases
(the tiny model has seen them, editors get them) and *held-out* ones (only probes ask them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from streams.data import table

WORDS: dict[str, Any] = table(__file__, "words.yaml")
PERSONS = 200
KINDS = ("country", "company", "club", "university")


@dataclass(frozen=True, slots=True)
class Relation:
    """One relation of one kind of entity.

    `name` is unique over kinds; `values` is a vocabulary (`VOCABULARIES`) or a kind, whose entities are the
    objects; `nouns` name the relation in a phrase; `hazard` is the expected number of changes a year, which
    the history uses as a weight; `cascade` is the slot (0 to 3) of the same entity that may change next.
    """

    name: str
    kind: str
    values: str
    nouns: tuple[str, ...]
    canonical: str
    hazard: float
    cascade: int | None = None

    @property
    def person(self) -> bool:
        return self.values == "person"


RELATIONS: dict[str, tuple[Relation, ...]] = {
    kind: tuple(Relation(kind=kind, **row) for row in rows) for kind, rows in WORDS["relations"].items()
}
SLOTS = 4
CAPTION_PROMPT, CAPTION_TRAIN, CAPTION_HELD = (WORDS["caption"][key] for key in ("prompt", "train", "held_out"))
NAMING_PROMPT, NAMING_TRAIN, NAMING_HELD = (WORDS["naming"][key] for key in ("prompt", "train", "held_out"))


def picture_ref(kind: str) -> str:
    """How a question by picture refers to the entity."""
    return f"the {kind} with this emblem"


def canonical(relation: Relation, ref: str) -> str:
    """The question that edits of the relation use as their prompt."""
    return relation.canonical.format(ref=ref)


def paraphrases(nouns: tuple[str, ...], ref: str, shift: int, held_out: bool, what: str = "What") -> list[str]:
    """The train (16) or held-out (8) combinations of a structure and one of three nouns; `shift` moves the split between them."""
    structures = WORDS["structures"]
    pairs = [(i, j) for i in range(len(structures)) for j in range(len(nouns)) if ((i + j + shift) % 3 == 0) is held_out]
    return [structures[i].format(what=what, noun=nouns[j], ref=ref) for i, j in pairs]


def phrasings(relation: Relation, ref: str, held_out: bool) -> tuple[str, ...]:
    """All train (16) or held-out (8) paraphrases of a relation's question; never the canonical one."""
    shift = RELATIONS[relation.kind].index(relation) + KINDS.index(relation.kind)
    return tuple(paraphrases(relation.nouns, ref, shift, held_out, "Who" if relation.person else "What"))


def invent(ending: str, count: int, rng: np.random.Generator, taken: set[str]) -> list[str]:
    """`count` new pronounceable names of one kind; adds them to `taken`."""
    onsets, vowels, codas, ends = WORDS["onsets"], WORDS["vowels"], WORDS["codas"], WORDS["endings"][ending]
    out: list[str] = []
    while len(out) < count:
        syllables = 2 if len(out) > 60 else 1
        stem = "".join(
            onsets[rng.integers(len(onsets))] + vowels[rng.integers(5)] + (codas[rng.integers(6)] if k == syllables - 1 else "")
            for k in range(syllables)
        )
        if stem[-1] in "aeiou":
            stem += "lnrst"[rng.integers(5)]
        name = stem + ends[rng.integers(len(ends))]
        if name not in taken and len(name) >= 4:
            taken.add(name)
            out.append(name if ending in ("currency", "product", "animal", "subject") else name.capitalize())
    return out


def vocabularies(rng: np.random.Generator, taken: set[str]) -> dict[str, tuple[str, ...]]:
    """Typed values other than entities: 200 persons (two words), 120 cities, 40 of each thing."""
    sizes = WORDS["sizes"]
    made = {k: tuple(invent(k, n, rng, taken)) for k, n in sizes.items()}
    first, last = made.pop("first"), made.pop("last")
    pairs = rng.permutation(len(first) * len(last))[:PERSONS]
    return {"person": tuple(f"{first[p // len(last)]} {last[p % len(last)]}" for p in pairs), **made}
