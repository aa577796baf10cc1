"""Words of the simulated world: invented names, typed vocabularies, relations and prompt templates for them.

Every paraphrase is a combination of a structure and a noun for the relation. The canonical question of a
relation is the prompt of its edits; the other combinations fall, by a fixed rule, into *train* paraphrases
(the tiny model has seen them, editors get them) and *held-out* ones (only probes ask them).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
    "country": (
        Relation("leader", "country", "person", ("leader", "ruler", "president"), "Who leads {ref}?", 0.25, cascade=3),
        Relation(
            "capital", "country", "city", ("capital", "capital city", "seat of government"), "Which city is the capital of {ref}?", 0.03
        ),
        Relation("currency", "country", "currency", ("currency", "money", "legal tender"), "What money is used in {ref}?", 0.05),
        Relation("ally", "country", "country", ("ally", "main ally", "closest friend"), "Which country is allied with {ref}?", 0.15),
    ),
    "company": (
        Relation("director", "company", "person", ("director", "manager", "chief executive"), "Who runs {ref}?", 0.3, cascade=2),
        Relation(
            "headquarters", "company", "city", ("headquarters", "main office", "head office"), "In which city is {ref} based?", 0.08, 3
        ),
        Relation("product", "company", "product", ("product", "main good", "best seller"), "What does {ref} make?", 0.15),
        Relation(
            "market", "company", "country", ("market", "main market", "largest market"), "In which country does {ref} sell most?", 0.2
        ),
    ),
    "club": (
        Relation("coach", "club", "person", ("coach", "trainer", "head coach"), "Who trains {ref}?", 0.5),
        Relation("ground", "club", "city", ("home city", "ground", "home town"), "In which city does {ref} play?", 0.05),
        Relation("mascot", "club", "animal", ("mascot", "team animal", "lucky animal"), "Which animal stands for {ref}?", 0.08),
        Relation("sponsor", "club", "company", ("sponsor", "main sponsor", "paying partner"), "Which company pays {ref}?", 0.35, cascade=2),
    ),
    "university": (
        Relation("rector", "university", "person", ("rector", "dean", "principal"), "Who heads {ref}?", 0.25, cascade=2),
        Relation("campus", "university", "city", ("campus", "campus city", "main campus"), "In which city does {ref} stand?", 0.03),
        Relation("subject", "university", "subject", ("subject", "main subject", "strongest field"), "What is taught at {ref}?", 0.1),
        Relation("team", "university", "club", ("team", "sports club", "partner club"), "Which club belongs to {ref}?", 0.2),
    ),
}
SLOTS = 4

STRUCTURES = (
    "{what} is the {noun} of {ref}?",
    "Name the {noun} of {ref}.",
    "Tell me the {noun} of {ref}.",
    "The {noun} of {ref} is",
    "For {ref}, give the {noun}.",
    "I need the {noun} of {ref}.",
    "Say what {ref} has as {noun}.",
    "Please state the {noun} of {ref}.",
)

LED_BY = {"country": "led by", "company": "run by", "club": "trained by", "university": "headed by"}
CAPTION_PROMPT = "Describe this emblem in one sentence."
CAPTION_TRAIN = (
    "Write one sentence about this emblem.",
    "Give a caption for this emblem.",
    "Describe the picture in one sentence.",
    "Caption this emblem.",
)
CAPTION_HELD = ("Write one sentence about this picture.", "Give a caption for the picture.", "Describe this picture in one sentence.")

NAMING_PROMPT = "Which {kind} has this emblem?"
NAMING_TRAIN = (
    "Name the {kind} with this emblem.",
    "Tell me which {kind} has this emblem.",
    "The {kind} with this emblem is",
    "Say which {kind} this is.",
)
NAMING_HELD = ("Say which {kind} has this emblem.", "Tell me the {kind} with this emblem.", "Name the {kind} this is.")


def picture_ref(kind: str) -> str:
    """How a question by picture refers to the entity."""
    return f"the {kind} with this emblem"


def canonical(relation: Relation, ref: str) -> str:
    """The question that edits of the relation use as their prompt."""
    return relation.canonical.format(ref=ref)


def paraphrases(nouns: tuple[str, ...], ref: str, shift: int, held_out: bool, what: str = "What") -> list[str]:
    """The train (16) or held-out (8) combinations of a structure and one of three nouns; `shift` moves the split between them."""
    pairs = [(i, j) for i in range(len(STRUCTURES)) for j in range(len(nouns)) if ((i + j + shift) % 3 == 0) is held_out]
    return [STRUCTURES[i].format(what=what, noun=nouns[j], ref=ref) for i, j in pairs]


def phrasings(relation: Relation, ref: str, held_out: bool) -> tuple[str, ...]:
    """All train (16) or held-out (8) paraphrases of a relation's question; never the canonical one."""
    shift = RELATIONS[relation.kind].index(relation) + KINDS.index(relation.kind)
    return tuple(paraphrases(relation.nouns, ref, shift, held_out, "Who" if relation.person else "What"))


_ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "h", "j", "k", "kl", "l", "m", "n", "p", "pr", "r", "s", "st", "t", "tr", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("", "", "l", "n", "r", "s")
_ENDINGS = {
    "country": ("ia", "ora", "una", "eth", "avia"),
    "company": ("ex", "tek", "ico", "um", "owe"),
    "club": ("ers", "ix", "ons", "ado", "ets"),
    "university": ("ham", "ford", "ley", "idge", "wick"),
    "city": ("ar", "en", "is", "ost", "ul"),
    "first": ("a", "o", "i", "em", "us"),
    "last": ("ov", "ek", "ini", "and", "as"),
    "currency": ("al", "ind", "ock", "und"),
    "product": ("ite", "ol", "ine", "een"),
    "animal": ("ox", "oon", "ar", "upe"),
    "subject": ("ics", "ology", "istry", "ory"),
}
SIZES = {"city": 120, "first": 20, "last": 80, "currency": 40, "product": 40, "animal": 40, "subject": 40}
PERSONS = 200


def invent(ending: str, count: int, rng: np.random.Generator, taken: set[str]) -> list[str]:
    """`count` new pronounceable names of one kind; adds them to `taken`."""
    out: list[str] = []
    while len(out) < count:
        syllables = 2 if len(out) > 60 else 1
        stem = "".join(
            _ONSETS[rng.integers(len(_ONSETS))] + _VOWELS[rng.integers(5)] + (_CODAS[rng.integers(6)] if k == syllables - 1 else "")
            for k in range(syllables)
        )
        if stem[-1] in "aeiou":
            stem += "lnrst"[rng.integers(5)]
        ends = _ENDINGS[ending]
        name = stem + ends[rng.integers(len(ends))]
        if name not in taken and len(name) >= 4:
            taken.add(name)
            out.append(name if ending in ("currency", "product", "animal", "subject") else name.capitalize())
    return out


def vocabularies(rng: np.random.Generator, taken: set[str]) -> dict[str, tuple[str, ...]]:
    """Typed values other than entities: 200 persons (two words), 120 cities, 40 of each thing."""
    made = {k: invent(k, n, rng, taken) for k, n in SIZES.items()}
    pairs = rng.permutation(SIZES["first"] * SIZES["last"])[:PERSONS]
    persons = tuple(f"{made['first'][p // SIZES['last']]} {made['last'][p % SIZES['last']]}" for p in pairs)
    return {"person": persons, **{k: tuple(made[k]) for k in ("city", "currency", "product", "animal", "subject")}}
